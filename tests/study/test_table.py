"""The one table of trainings, its report and its figure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from autosparse.core.files import read_json, write_json
from autosparse.models.config import ModelConfig
from autosparse.study import grid, plan, table
from tests.study.small import result, sweep


def _result(criterion: str, sparsity: float, accuracy: float, seed: int) -> dict:
    return {
        "model": "m", "criterion": criterion, "sparsity": sparsity, "seed": seed,
        "test_accuracy": accuracy, "validation_accuracy": accuracy,
        "parameters": 100, "checkpoint_bytes": 400, "seconds": 2.0,
        "prune_seconds": 0.5,
    }  # fmt: skip


RESULTS = [
    _result("dense", 0.0, 0.9, 0),
    _result("erk", 0.9, 0.5, 0),
    _result("erk", 0.9, 0.7, 1),
    _result("snip", 0.9, 0.8, 0),
]


def test_seeds_are_taken_together() -> None:
    dense, snip, erk = table.rows([table.placed(each) for each in RESULTS])
    assert (dense["label"], snip["label"], erk["label"]) == ("dense", "snip", "erk")
    assert erk["accuracy"] == pytest.approx(0.6)
    assert erk["spread"] == pytest.approx(0.02**0.5)
    assert (erk["seeds"], snip["seeds"]) == (2, 1)
    assert snip["spread"] == 0.0


def test_the_table_shows_mean_and_spread(capsys: pytest.CaptureFixture) -> None:
    table.show_trainings(RESULTS)
    shown = capsys.readouterr().out
    assert "60.0±14.1" in shown
    assert re.search("│ +90 │", shown)


def test_table_and_best_take_variations_apart(tmp_path: Path):
    settings = sweep(tmp_path, criteria=["snip"], sparsities=[0.5],
                      variations=[{}, {"learning_rate": 0.01}])  # fmt: skip
    found = plan.cells(settings)
    accuracy = {("dense", 0.003): 0.9, ("snip", 0.003): 0.7, ("dense", 0.01): 0.8,
                ("snip", 0.01): 0.75}  # fmt: skip
    for cell in found:
        rate = cell.config.training.learning_rate
        result(cell, accuracy[cell.label, rate] + cell.seed / 10)
    rows = table.table(found)
    assert [(r["training"], r["label"]) for r in rows] == [
        ("", "dense"), ("learning_rate 0.01", "dense"),
        ("", "snip"), ("learning_rate 0.01", "snip"),
    ]  # fmt: skip
    assert rows[2]["accuracy"] == pytest.approx(0.75)
    assert rows[2]["spread"] == pytest.approx(0.1 / 2**0.5)
    assert rows[2]["step_seconds"] == pytest.approx(3.0), "6 s for 200 images in steps of 100"
    best = table.best(rows)
    assert [(r["label"], r["training"]) for r in best] == [
        ("dense", ""), ("snip", "learning_rate 0.01"),
    ]  # fmt: skip
    shown = list(table.shown(rows))
    assert "training" in shown[0] and "model" not in shown[0] and "verdict" not in shown[0]


def test_models_of_one_name_and_other_data_are_no_rivals(tmp_path: Path):
    models = [ModelConfig("test_byobnet"), ModelConfig("test_byobnet", exclude=["head"])]
    settings = sweep(tmp_path, criteria=["snip"], sparsities=[0.5], seeds=[0], models=models,
                     axes={"data.name": ["digits", "mnist"]})  # fmt: skip
    found = plan.cells(settings)
    assert len(found) == 2 * 2 * 2
    for cell in found:
        result(cell, 0.6 + 0.2 * (cell.config.model == models[1]))
    rows = table.table(found)
    assert len({row["contest"] for row in rows}) == 4
    snip = [row for row in table.best(rows) if row["label"] == "snip"]
    assert [(row["accuracy"], row["training"]) for row in snip] == [
        (0.6, "data.name digits"), (0.6, "data.name mnist"),
        (0.8, "exclude ['head'], data.name digits"), (0.8, "exclude ['head'], data.name mnist"),
    ]  # fmt: skip
    best = table.best_results([cell.result() for cell in found])
    assert sorted(each["test_accuracy"] for each in best) == [0.6, 0.6, 0.8, 0.8]


def test_ways_to_augment_one_data_set_are_rivals(tmp_path: Path):
    settings = sweep(tmp_path, criteria=["snip"], sparsities=[0.5], seeds=[0],
                     axes={"data.augment": ["none", "shift"]})  # fmt: skip
    found = plan.cells(settings)
    for cell in found:
        result(cell, 0.6 if cell.config.data.augment == "none" else 0.7)
    (best,) = table.best_results([cell.result() for cell in found])
    assert best["training"] == "data.augment shift"


def test_a_dense_training_is_in_every_group_that_only_prunes_otherwise(tmp_path: Path):
    settings = sweep(tmp_path, criteria=["snip"], sparsities=[0.5], seeds=[0],
                     axes={"scope": ["global", "layer"], "scoring.batches": [1, 2]})  # fmt: skip
    found = plan.cells(settings)
    assert [cell.label for cell in found] == ["dense"] + ["snip"] * 4
    for cell in found:
        result(cell, 0.9 if cell.label == "dense" else 0.6)
    rows = table.table(found)
    dense = [row["training"] for row in rows if row["label"] == "dense"]
    assert dense == [row["training"] for row in rows if row["label"] == "snip"]
    assert len(set(dense)) == 4


def test_a_dense_training_is_in_every_group_whose_topology_is_another(tmp_path: Path):
    variations = [
        {},
        {"topology": "rigl", "topology_every": 5},
        {"optimizer_wrapper": "ham"},
        {"optimizer_wrapper": "ham", "topology": "set"},
    ]
    settings = sweep(
        tmp_path, criteria=["snip"], sparsities=[0.5], seeds=[0], variations=variations
    )
    found = plan.cells(settings)
    assert [cell.label for cell in found].count("dense") == 2, "one plain, one with HAM"
    for cell in found:
        wrapped = cell.config.training.optimizer_wrapper == "ham"
        result(cell, (0.8 if wrapped else 0.9) if cell.label == "dense" else 0.6)
    rows = [row for row in table.table(found) if row["label"] == "dense"]
    assert [row["accuracy"] for row in rows] == [0.9, 0.9, 0.8, 0.8]
    assert len({row["training"] for row in rows}) == 4


def test_values_that_look_alike_when_rounded_are_rows_of_their_own(tmp_path: Path):
    rates = [0.0012341, 0.0012342, 0.00123420001]
    settings = sweep(tmp_path, criteria=["snip"], sparsities=[0.5], seeds=[0],
                      axes={"training.learning_rate": rates})  # fmt: skip
    found = plan.cells(settings)
    accuracy = dict(zip(rates, (0.2, 0.4, 0.6), strict=True))
    for cell in found:
        result(cell, accuracy[cell.config.training.learning_rate])
    rows = [row for row in table.table(found) if row["label"] == "snip"]
    assert [(row["seeds"], row["accuracy"]) for row in rows] == [(1, 0.2), (1, 0.4), (1, 0.6)]
    planned, _ = plan.dry_run(settings)
    assert [row["cells"] for row in planned] == [1] * 6


def test_controls_that_an_axis_does_not_concern_are_in_every_group(tmp_path: Path):
    settings = sweep(
        tmp_path, criteria=["iter_snip"], sparsities=[0.5], twins=["shuffled", "uniform"],
        axes={"options.iter_snip.rounds": [2, 3]},
    )  # fmt: skip
    found = plan.cells(settings)
    assert [cell.label for cell in found].count("uniform") == 2, "one a seed, trained once"
    for cell in found:
        accuracy = {"dense": 0.9, "uniform": 0.3}.get(cell.label, 0.6)
        result(cell, accuracy - (cell.twin == "shuffled") / 10 + cell.seed / 1000)
    rows = [row for row in table.table(found) if row["label"] == "iter_snip"]
    assert [row["training"] for row in rows] == [
        "options.iter_snip.rounds 2", "options.iter_snip.rounds 3",
    ]  # fmt: skip
    for row in rows:
        assert row["verdict"] == "selection matters"
        assert row["twins"]["uniform"]["accuracy"] == pytest.approx(0.3005)


def test_the_report_names_what_failed(tmp_path: Path):
    settings = sweep(tmp_path, criteria=["snip"], sparsities=[0.5], seeds=[0])
    dense, snip = plan.cells(settings)
    result(dense, 0.5)
    write_json(snip.folder / grid.FAILED, {"error": "the loss is nan"})
    path = table.write_report(settings, table.table([dense, snip]), [dense, snip])
    found = read_json(path)
    assert found["failed"] == {snip.key: "the loss is nan"}
    assert [each["cell"] for each in found["results"]] == [dense.key]
    assert "history" not in found["results"][0]
