"""The core needs no Ray, DeepSpeed, MLflow or WebDataset, and imports point downwards only."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import autosparse

PACKAGE = Path(autosparse.__file__).parent
EDGES = ("ray", "deepspeed", "mlflow")
LAYERS = (
    ("errors",),
    ("contract", "files", "logs", "memory", "progress", "versions"),
    ("data_identity",),
    ("config",),
    ("style", "gradients"),
    ("roles",),
    (
        "masks",
        "models",
        "data",
        "features",
        "figures",
        "results",
        "sparse_products",
        "standardised",
    ),
    ("compaction", "survival", "table", "paths", "rounds"),
    ("reach", "flat_kernels"),
    ("flat_scatter",),
    ("ticket", "claims", "optimizers", "scorer"),
    ("recipe",),
    ("steppers",),
    ("training", "masked_stepper"),
    ("criteria",),
    ("corpus", "scoring"),
    ("pruning",),
    ("fit_scorer", "cells"),
    ("irp", "corpus_figures", "fit_survival", "sparse_training", "sweep_figures"),
    ("controls", "watching"),
    ("compare", "corpus_report", "exporting", "plan", "upkeep", "autos_figures"),
    ("verdicts",),
    ("sweep",),
    ("drawing",),
    ("report",),
    ("integrations",),
    ("verbs",),
    ("cli",),
    ("quickstart",),
)
"""From the bottom to the top; a package (data, criteria, integrations) is one module here."""
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}
DISPATCHED = {("verbs", "quickstart")}
"""`autosparse quickstart` is a verb, and itself a user of the command line."""


def modules() -> dict[str, Path]:
    """Return every module's dotted name, without `autosparse`, and its file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return {name: path for name, path in found.items() if name}


def unit(module: str) -> str:
    return module.partition(".")[0]


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the full name of all that is imported, also inside functions, not for typing only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node)


def imported(path: Path) -> set[str]:
    return set(imports(ast.parse(path.read_text())))


def own(names: set[str]) -> set[str]:
    """Return the units of this package among imported names."""
    return {name.split(".")[1] for name in names if name.startswith("autosparse.")}


def core() -> list[str]:
    return [name for name in modules() if unit(name) not in ("integrations", "quickstart")]


def test_core_imports_none_of_the_edges():
    names = [f"autosparse.{name}" for name in core()]
    assert "autosparse.irp.run" in names
    assert "autosparse.data.shards" in names
    program = (
        "import importlib, sys\n"
        f"for name in {names}: importlib.import_module(name)\n"
        f"print([name for name in {(*EDGES, 'webdataset')} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


@pytest.mark.parametrize("name", core())
def test_core_names_the_edges_nowhere(name):
    """Not inside a function either: only integrations know Ray, DeepSpeed and MLflow."""
    assert not {each.partition(".")[0] for each in imported(modules()[name])} & set(EDGES)


@pytest.mark.parametrize("edge", EDGES)
def test_each_edge_is_imported_by_its_own_integration_only(edge):
    users = {
        name
        for name, path in modules().items()
        if edge in {each.partition(".")[0] for each in imported(path)}
    }
    own = f"integrations.{edge}"
    more = {
        "ray": {"integrations.tune"},
        "deepspeed": {"integrations.deepspeed_checkpoints"},
        "mlflow": {"integrations.tracking", "integrations.registry", "integrations.promotion"},
    }
    assert users == {own} | more[edge]


def test_every_module_has_a_layer():
    assert {unit(name) for name in modules()} <= set(HEIGHT)


@pytest.mark.parametrize("name", modules())
def test_imports_point_downwards(name):
    mine = unit(name)
    for other in own(imported(modules()[name])) - {mine}:
        if (mine, other) not in DISPATCHED:
            assert HEIGHT[other] < HEIGHT[mine], f"{name} imports {other}"


@pytest.mark.parametrize("name", modules())
def test_library_knows_nothing_of_its_scripts(name):
    above = {"launch", "ray_jobs", "benchmarks", "tests"}
    assert not {each.partition(".")[0] for each in imported(modules()[name])} & above


def test_imports_are_found_wherever_they_stand():
    """The checks above rest on this."""
    source = (
        "from typing import TYPE_CHECKING\n"
        "import autosparse.core.config as c\n"
        "if TYPE_CHECKING:\n    from autosparse.sparsity.ticket import Ticket\n"
        "def f():\n    with g():\n        from autosparse import masks, models\n"
    )
    found = set(imports(ast.parse(source)))
    assert own(found) == {"config", "masks", "models"}
