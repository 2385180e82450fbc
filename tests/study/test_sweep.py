"""Sweeps: which cells there are, what is over, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from autosparse.core.errors import UsageError
from autosparse.core.files import read_json, write_json
from autosparse.data.sets import DataSource
from autosparse.models.config import ModelConfig
from autosparse.study import compare, sweep
from autosparse.study.config import SweepConfig
from autosparse.study.trainings import RESULT
from tests.conftest import QUICK, SMALL_DIGITS


def config(out: Path, /, **changes) -> SweepConfig:
    settings = {
        "models": [ModelConfig("test_byobnet")],
        "data": SMALL_DIGITS,
        "criteria": ["snip", "magnitude"],
        "sparsities": [0.5, 0.8],
        "seeds": [0, 1],
        "training": QUICK,
        "tracking": False,
        "out": str(out),
    }
    return SweepConfig(**{**settings, **changes})


def result(cell: sweep.SweepCell, accuracy: float) -> None:
    """Write a cell's result as if it had been trained."""
    write_json(cell.folder / RESULT, {
        "name": cell.trial.name, "seed": cell.trial.seed, "test_accuracy": accuracy,
        "validation_accuracy": accuracy, "kept": 10, "parameters": 20, "checkpoint_bytes": 100,
        "seconds": 6.0, "training_passes": 200, "image_passes": 0.0, "effective_density": None,
        "history": [{"epoch": 1, "validation_accuracy": accuracy}],
    })  # fmt: skip


def test_the_cells_are_the_product_of_all_lists(tmp_path: Path):
    variations = [{}, {"learning_rate": 0.01}]
    models = [ModelConfig("test_byobnet"), ModelConfig("test_resnet")]
    found = sweep.cells(config(tmp_path, models=models, variations=variations))
    # Per model, variation and seed: dense, and two criteria at two sparsities.
    assert len(found) == len({cell.key for cell in found}) == 2 * 2 * 2 * (1 + 2 * 2)
    assert {cell.config.training.learning_rate for cell in found} == {0.003, 0.01}


def test_a_cell_is_the_same_as_that_of_a_comparison(tmp_path: Path):
    found = sweep.cells(config(tmp_path))
    compared = sweep.comparison(config(tmp_path), 0, {})
    assert [c.folder for c in found] == [
        compare.folder_of(compared, trial) for trial in compare.trials(compared)
    ]


def test_only_cells_of_one_model_sparsity_and_seed_compete(tmp_path: Path):
    found = sweep.cells(config(tmp_path, asha=True, variations=[{}, {"learning_rate": 0.01}]))
    groups: dict = {}
    for cell in found:
        groups.setdefault(cell.group, []).append(cell.trial)
    assert len(groups) == 2 * 3
    for trials in groups.values():
        assert len({(trial.sparsity, trial.seed) for trial in trials}) == 1
    assert sorted(len(trials) for trials in groups.values()) == [2, 2, 4, 4, 4, 4]


def test_what_became_of_a_cell_is_known_from_its_folder(tmp_path: Path):
    cell = sweep.cells(config(tmp_path, asha=True))[1]
    assert (cell.state, cell.over) == ("to do", False)
    write_json(cell.folder / sweep.FAILED, {"error": "no"})
    assert (cell.state, cell.over) == ("failed", False)
    write_json(cell.folder / sweep.STOPPED, {"history": [{"epoch": 1}]})
    assert (cell.state, cell.over) == ("stopped", True)
    without = next(c for c in sweep.cells(config(tmp_path)) if c.key == cell.key)
    assert not without.over, "without ASHA it is to be finished"
    result(cell, 0.5)
    assert (cell.state, cell.over) == ("finished", True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": "gird"}, "unknown search 'gird'.*'grid'"),
        ({"models": []}, "models is empty"),
        ({"criteria": "snyp"}, "unknown criterion 'snyp'"),
        ({"variations": [{"learning_rat": 1.0}]}, "in variations 'learning_rat'.*'learning_rate'"),
        ({"variations": [{"optimizer": "adamww"}]}, "adamww"),
        ({"space": {"learning_rate": [1.0]}}, "`space` is for search optuna"),
        ({"search": "optuna", "space": {"epoch": [1]}}, "in space 'epoch'"),
        ({"search": "optuna", "space": {"epochs": 3}}, "space.epochs must be a list"),
        ({"search": "optuna", "samples": 0}, "samples must be"),
        ({"search": "optuna", "twins": ["erk"]}, "takes no twins"),
        ({"asha": True, "twins": ["shuffled"]}, "stop controls early"),
        ({"asha": True, "asha_factor": 1}, "asha_factor"),
        ({"out": "memory://x"}, "no URL"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(tmp_path: Path, changes, message):
    with pytest.raises(UsageError, match=message):
        sweep.check(config(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_suggestion_gives_the_same_cell_again_and_is_found_by_its_study(tmp_path: Path):
    settings = config(tmp_path, search="optuna", space={"learning_rate": [0.01, 0.02]})
    point = {"label": "snip", "learning_rate": 0.02}
    cell = sweep.write_point(settings, 0, 0.8, point)
    assert cell.config.training.learning_rate == 0.02
    assert cell.trial.label == "snip" and cell.trial.seed in (0, 1)
    assert sweep.points(settings, 0, 0.8) == [point]
    assert sweep.points(settings, 0, 0.5) == []
    assert cell.key in [each.key for each in sweep.cells(settings)]
    changed = config(tmp_path, search="optuna", space={"learning_rate": [0.01]}, seeds=[7])
    assert sweep.points(changed, 0, 0.8) == [], "with other seeds it is another cell"


def test_suggestions_get_all_seeds(tmp_path: Path):
    settings = config(tmp_path, search="optuna", space={"learning_rate": [0.1]})
    seeds = [
        sweep.suggested(settings, 0, 0.8, {"label": "snip", "learning_rate": rate / 100}).trial.seed
        for rate in range(1, 41)
    ]
    assert 10 < sum(seeds) < 30


def test_table_and_best_take_variations_apart(tmp_path: Path, digits: DataSource):
    settings = config(tmp_path, criteria=["snip"], sparsities=[0.5],
                      variations=[{}, {"learning_rate": 0.01}])  # fmt: skip
    found = sweep.cells(settings)
    accuracy = {("dense", 0.003): 0.9, ("snip", 0.003): 0.7, ("dense", 0.01): 0.8,
                ("snip", 0.01): 0.75}  # fmt: skip
    for cell in found:
        rate = cell.config.training.learning_rate
        result(cell, accuracy[cell.trial.label, rate] + cell.trial.seed / 10)
    rows = sweep.table(settings, found, digits)
    assert [(r["training"], r["label"]) for r in rows] == [
        ("", "dense"), ("learning_rate 0.01", "dense"),
        ("", "snip"), ("learning_rate 0.01", "snip"),
    ]  # fmt: skip
    assert rows[2]["accuracy"] == pytest.approx(0.75)
    assert rows[2]["spread"] == pytest.approx(0.1 / 2**0.5)
    assert rows[2]["step_seconds"] == pytest.approx(3.0), "6 s for 200 images in steps of 100"
    best = sweep.best(rows)
    assert [(r["label"], r["training"]) for r in best] == [
        ("dense", ""), ("snip", "learning_rate 0.01"),
    ]  # fmt: skip
    shown = list(sweep.shown(rows))
    assert "training" in shown[0] and "model" not in shown[0] and "verdict" not in shown[0]


def test_the_dry_run_counts_what_is_left(tmp_path: Path):
    settings = config(tmp_path, criteria=["snip"], sparsities=[0.5])
    cells = sweep.cells(settings)
    result(cells[0], 0.5)
    write_json(cells[1].folder / sweep.FAILED, {"error": "no"})
    rows, line = sweep.dry_run(settings)
    assert [(r["criterion"], r["cells"], r["finished"], r["failed"]) for r in rows] == [
        ("dense", 2, 1, 0), ("snip", 2, 0, 1),
    ]  # fmt: skip
    assert line.startswith("4 cells, 1 over, 3 to do")


def test_the_report_names_what_failed(tmp_path: Path, digits: DataSource):
    settings = config(tmp_path, criteria=["snip"], sparsities=[0.5], seeds=[0])
    dense, snip = sweep.cells(settings)
    result(dense, 0.5)
    write_json(snip.folder / sweep.FAILED, {"error": "the loss is nan"})
    path = sweep.write_report(settings, sweep.table(settings, [dense, snip], digits), [dense, snip])
    found = read_json(path)
    assert found["failed"] == {snip.key: "the loss is nan"}
    assert [each["cell"] for each in found["results"]] == [dense.key]
    assert "history" not in found["results"][0]
