"""What may import what. The order of packages is import-linter's (pyproject.toml)."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import autosparse

PACKAGE = Path(autosparse.__file__).parent
EDGES = {
    "ray": {"ray", "tune"},
    "deepspeed": {"deepspeed", "deepspeed_checkpoints", "deepspeed_ranks", "deepspeed_values"},
    "mlflow": {"measured", "mlflow", "promotion", "registry", "registry_pages"},
}
"""Library -> the modules of `integrations` that may import it."""
SCRIPTS = {"launch", "ray_jobs", "benchmarks", "tests"}


def modules() -> dict[str, Path]:
    """Return every module's dotted name, and its file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imported(path: Path) -> set[str]:
    """Return the top-level names of all that a file imports, inside functions too."""

    def names(tree: ast.AST) -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: imports are absolute here"
                yield str(node.module)

    return {name.partition(".")[0] for name in names(ast.parse(path.read_text()))}


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    """The checks below rest on this."""
    source = tmp_path / "module.py"
    source.write_text("import a.b\ndef f():\n    with g():\n        from c.d import e\n")
    assert imported(source) == {"a", "c"}


def test_the_order_of_packages_is_kept() -> None:
    """As `lint-imports` in continuous integration does; here so that a plain pytest tells."""
    pytest.importorskip("importlinter")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    done = subprocess.run(
        [*command, "--no-cache"], capture_output=True, text=True, cwd=PACKAGE.parent, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("edge", EDGES)
def test_each_edge_is_imported_by_its_own_integration_only(edge: str) -> None:
    users = {name for name, path in modules().items() if edge in imported(path)}
    assert users == {f"autosparse.integrations.{name}" for name in EDGES[edge]}


def test_the_library_knows_nothing_of_its_scripts() -> None:
    assert not {name for name, path in modules().items() if imported(path) & SCRIPTS}


def test_importing_all_but_the_edges_loads_none_of_them() -> None:
    """Nor WebDataset: what a criterion or a training needs is torch and timm."""
    names = [each for each in modules() if not each.startswith("autosparse.integrations")]
    assert {"autosparse.irp.run", "autosparse.data.shards"} <= set(names)
    program = (
        "import importlib, sys\n"
        f"for name in {names}: importlib.import_module(name)\n"
        f"print([name for name in {(*EDGES, 'webdataset')} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
