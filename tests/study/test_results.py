"""The table of results and its figure."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from PIL import Image

from autosparse.report import figures
from autosparse.study import results


def _result(criterion: str, sparsity: float, accuracy: float, seed: int) -> dict:
    return {
        "model": "m", "criterion": criterion, "sparsity": sparsity, "test_accuracy": accuracy,
        "seed": seed, "parameters": 100, "checkpoint_bytes": 400, "seconds": 2.0,
        "prune_seconds": 0.5,
    }  # fmt: skip


RESULTS = [
    _result("dense", 0.0, 0.9, 0),
    _result("erk", 0.9, 0.5, 0),
    _result("erk", 0.9, 0.7, 1),
    _result("snip", 0.9, 0.8, 0),
]


def test_seeds_are_taken_together() -> None:
    dense, snip, erk = results.summary(RESULTS)
    assert (dense["criterion"], snip["criterion"], erk["criterion"]) == ("dense", "snip", "erk")
    assert erk["accuracy"] == pytest.approx(0.6)
    assert erk["spread"] == pytest.approx(0.02**0.5)
    assert (erk["seeds"], snip["seeds"]) == (2, 1)
    assert snip["spread"] == 0.0


def test_the_table_shows_mean_and_spread(capsys: pytest.CaptureFixture) -> None:
    results.show(RESULTS)
    shown = capsys.readouterr().out
    assert "60.0% ± 14.1%" in shown
    assert "90.0%" in shown


def test_the_figure_has_its_data_beside_it(tmp_path: Path) -> None:
    rows = results.summary(RESULTS)
    path = figures.accuracy_against_sparsity(rows, tmp_path / "a.png", "title")
    with Image.open(path) as image:
        assert min(image.size) > 400
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 10
    with (tmp_path / "a.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row["criterion"] for row in written] == ["dense", "snip", "erk"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.csv", "a.png"]
