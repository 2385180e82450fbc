"""Cells that Optuna chooses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from autosparse.study import plan, search
from tests.study.small import result, sweep


def test_a_suggestion_gives_the_same_cell_again_and_is_found_by_its_study(tmp_path: Path):
    settings = sweep(tmp_path, search="optuna", space={"learning_rate": [0.01, 0.02]})
    point = {"label": "snip", "learning_rate": 0.02}
    cell = search.write_point(settings, 0, 0.8, point)
    assert cell.config.training.learning_rate == 0.02
    assert cell.label == "snip" and cell.seed in (0, 1)
    assert search.points(settings, 0, 0.8) == [point]
    assert search.points(settings, 0, 0.5) == []
    assert cell.key in [each.key for each in plan.cells(settings)]
    changed = sweep(tmp_path, search="optuna", space={"learning_rate": [0.01]}, seeds=[7])
    assert search.points(changed, 0, 0.8) == [], "with other seeds it is another cell"


def test_a_search_of_few_choices_is_over_when_all_are(tmp_path: Path):
    space = {"learning_rate": [0.01, 0.02, 0.01]}
    settings = sweep(tmp_path, search="optuna", samples=20, sparsities=[0.5], space=space)
    dense = sum(cell.label == "dense" for cell in plan.cells(settings))
    assert plan.left(settings, plan.cells(settings)) == dense + 4
    for label in ("snip", "magnitude"):
        for rate in (0.01, 0.02):
            point = {"label": label, "learning_rate": rate}
            result(search.write_point(settings, 0, 0.5, point), 0.5)
    assert plan.left(settings, plan.cells(settings)) == dense
    ranged = replace(settings, space={"learning_rate": {"low": 0.01, "high": 0.02}})
    assert search.samples(ranged) == 20
    assert search.samples(replace(settings, samples=3)) == 3


def test_suggestions_get_all_seeds(tmp_path: Path):
    settings = sweep(tmp_path, search="optuna", space={"learning_rate": [0.1]})
    seeds = [
        search.suggested(settings, 0, 0.8, {"label": "snip", "learning_rate": rate / 100}).seed
        for rate in range(1, 41)
    ]
    assert 10 < sum(seeds) < 30
