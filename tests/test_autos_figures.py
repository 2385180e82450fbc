"""AutoS's pictures: drawn, and the data beside them."""

from __future__ import annotations

from pathlib import Path

from autosparse.autos_figures import calibration, frontier
from tests.test_corpus_figures import written


def test_calibration(tmp_path: Path) -> None:
    rows = [
        {"predicted": 0.0, "alive": 0.01, "weights": 5},
        {"predicted": 0.5, "alive": 0.4, "weights": 7},
        {"predicted": 1.0, "alive": 1.0, "weights": 2},
    ]
    found = written(calibration(rows, tmp_path / "c.png", "made up"))
    assert [row["weights"] for row in found] == ["5", "7", "2"]


def test_frontier(tmp_path: Path) -> None:
    rows = [
        {"label": "dense", "accuracy": 0.6, "spread": 0.0, "cost_share": 0.0},
        {"label": "erk", "accuracy": 0.5, "spread": 0.01, "cost_share": 0.0},
        {"label": "autos_irp", "accuracy": 0.55, "spread": 0.02, "cost_share": 0.05},
    ]
    found = written(frontier(rows, tmp_path / "f.png", "made up"))
    assert [row["label"] for row in found] == ["dense", "erk", "autos_irp"]
