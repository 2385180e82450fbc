"""A study before it runs: mistakes, and what is left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from autosparse.core.errors import UsageError
from autosparse.core.files import write_json
from autosparse.data import digits
from autosparse.models.config import ModelConfig
from autosparse.study import grid, plan
from tests.conftest import QUICK
from tests.study.small import comparison, result, sweep


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criteria": ["snyp"]}, "unknown criterion 'snyp'.*'snip'"),
        ({"twins": ["shufled"]}, "unknown twin 'shufled'.*'shuffled'"),
        ({"sparsities": [1.0]}, "sparsity must be"),
        ({"sparsities": "0.9,x"}, "a list of numbers is wanted"),
        ({"seeds": []}, "at least one"),
        ({"seeds": "0,x"}, "a list of whole numbers is wanted, such as 0,1,2"),
        ({"options": {"snap": {}}}, "unknown label in options 'snap'"),
        ({"options": {"snip": {"rounds": 3}}}, "unknown option of snip 'rounds'"),
        ({"criteria": ["irp"], "options": {"irp": {"leveis": 3}}}, "leveis"),
        ({"criteria": ["irp"], "options": {"irp": {"seed": 3}}}, "compare settles it"),
        ({"guard": "layers"}, "unknown guard 'layers'"),
        ({"allocation": "erq"}, "unknown criterion 'erq'"),
        ({"axes": {"training.topology": ["static", "gmp"]}}, "gmp begins with the dense model"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(tmp_path: Path, changes, message):
    with pytest.raises(UsageError, match=message):
        plan.check(comparison(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": "gird"}, "unknown search 'gird'.*'grid'"),
        ({"model": ModelConfig("test_vit")}, "are both given"),
        ({"executor": "slurm"}, "unknown executor 'slurm'"),
        ({"executor": "local", "asha": True}, "set executor to ray"),
        ({"axes": {"out": ["a"]}}, "unknown setting in axes 'out'"),
        ({"axes": {"training.epochz": [1]}}, "in axes 'epochz'.*'epochs'"),
        ({"axes": {"training.checkpoint_epochs": [1, 2]}}, "checkpoint_epochs"),
        ({"axes": {"data.augmentt": ["none"]}}, "setting of DataConfig 'augmentt'"),
        ({"axes": {"scope": "layer"}}, "axes.scope must be a list"),
        ({"criteria": "snyp"}, "unknown criterion 'snyp'"),
        ({"variations": [{"learning_rat": 1.0}]}, "in variations 'learning_rat'.*'learning_rate'"),
        ({"variations": [{"optimizer": "adamww"}]}, "adamww"),
        ({"space": {"learning_rate": [1.0]}}, "`space` is for search optuna"),
        ({"search": "optuna", "space": {"epoch": [1]}}, "in space 'epoch'"),
        ({"search": "optuna", "space": {"epochs": 3}}, "space.epochs must be a list"),
        ({"search": "optuna", "space": {"training.topology": ["static", "gmp"]}}, "gmp begins"),
        ({"search": "optuna", "space": {"optimizer": ["adamw", "adamv"]}}, "adamv"),
        ({"search": "optuna", "space": {"batch_size": {"low": 0, "high": 9}}}, "batch_size must"),
        ({"search": "optuna", "samples": 0}, "samples must be"),
        ({"search": "optuna", "twins": ["erk"]}, "takes no twins"),
        ({"asha": True, "twins": ["shuffled"]}, "stop controls early"),
        ({"asha": True, "asha_factor": 1}, "asha_factor"),
        ({"out": "memory://x"}, "no URL"),
        (
            {"executor": "deepspeed", "training": replace(QUICK, precision="fp16")},
            "fp16 does not work; use bf16",
        ),
    ],
)
def test_mistakes_of_sweeps_are_found_before_anything_is_trained(tmp_path: Path, changes, message):
    with pytest.raises(UsageError, match=message):
        plan.check(sweep(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_choice_names_what_does_not_apply_before_anything_is_trained(tmp_path: Path):
    with pytest.raises(UsageError, match="autos chooses the weights itself, so scope layer"):
        plan.check(comparison(tmp_path, criteria="snip,autos", scope="layer"))
    labelled = {"short": {"criterion": "short_irp", "levels": 1}}
    with pytest.raises(UsageError, match="short_irp chooses the weights itself, so guard live"):
        plan.check(comparison(tmp_path, criteria="short", options=labelled, guard="live"))


def test_the_dry_run_counts_what_is_left(tmp_path: Path, monkeypatch):
    loaded = []
    load = digits.load_digits
    monkeypatch.setattr(digits, "load_digits", lambda *given: loaded.append(1) or load(*given))
    settings = sweep(tmp_path, criteria=["snip"], sparsities=[0.5])
    cells = plan.cells(settings)
    result(cells[0], 0.5)
    write_json(cells[1].folder / grid.FAILED, {"error": "no"})
    rows, line = plan.dry_run(settings)
    assert [(r["criterion"], r["cells"], r["finished"], r["failed"]) for r in rows] == [
        ("dense", 2, 1, 0), ("snip", 2, 0, 1),
    ]  # fmt: skip
    assert line.startswith("4 cells, 1 over, 3 to do")
    assert loaded == [1], "once for all cells"
