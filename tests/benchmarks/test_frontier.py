"""Accuracy over cost: what the CSV beside the figure says."""

from __future__ import annotations

import csv
from pathlib import Path

from benchmarks.frontier import frontier


def test_frontier(tmp_path: Path) -> None:
    rows = [
        {"label": "dense", "accuracy": 0.6, "spread": 0.0, "cost_share": 0.0},
        {"label": "erk", "accuracy": 0.5, "spread": 0.01, "cost_share": 0.0},
        {"label": "autos_irp", "accuracy": 0.55, "spread": 0.02, "cost_share": 0.05},
    ]
    path = frontier(rows, tmp_path / "f.png", "made up")
    with path.with_suffix(".csv").open() as file:
        found = list(csv.DictReader(file))
    assert [row["label"] for row in found] == ["dense", "erk", "autos_irp"]
