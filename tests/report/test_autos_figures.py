"""AutoS's figures: the surface of a network made by hand, and a calibration."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch

from autosparse.autos.network import AutoS
from autosparse.report import autos_figures


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.with_suffix(".csv").open() as file:
        return list(csv.DictReader(file))


def linear(kind: str, weights: dict[int, float]) -> AutoS:
    """An AutoS without hidden layers: a weighted sum of its inputs."""
    network = AutoS(kind, [])
    with torch.no_grad():
        network.layers[0].weight.zero_()
        network.layers[0].bias.zero_()
        for place, value in weights.items():
            network.layers[0].weight[0, place] = value
    return network


def test_the_surface_is_what_the_network_says(tmp_path: Path):
    network = linear("context", {0: 1.0, 1: 10.0, 2: 100.0})
    rows = rows_of(autos_figures.surface(network, tmp_path / "s.png"))
    assert len(rows) == 2 * autos_figures.STEPS**2
    assert {row["sign_of_product"] for row in rows} == {"-1.0", "1.0"}
    for row in rows[::97]:
        w, g, sign = (float(row[key]) for key in ("weight", "gradient", "sign_of_product"))
        expected = w + 10 * math.asinh(g) + 100 * math.asinh(sign * w * g)
        assert float(row["predicted_survival"]) == pytest.approx(expected, abs=1e-3)


def test_the_surface_of_papers_features_goes_around_their_mean(tmp_path: Path):
    network = linear("paper", {0: 1.0, 1: 0.0})
    network.mean.copy_(torch.tensor([2.0, 0.0]))
    network.std.copy_(torch.tensor([0.5, 1.0]))
    rows = rows_of(autos_figures.surface(network, tmp_path / "s.png"))
    weights = [float(row["weight"]) for row in rows]
    assert (min(weights), max(weights)) == (0.5, 3.5)
    assert float(rows[0]["predicted_survival"]) == pytest.approx((0.5 - 2.0) / 0.5)


def test_calibration(tmp_path: Path) -> None:
    rows = [
        {"predicted": 0.0, "alive": 0.01, "weights": 5},
        {"predicted": 0.5, "alive": 0.4, "weights": 7},
        {"predicted": 1.0, "alive": 1.0, "weights": 2},
    ]
    found = rows_of(autos_figures.calibration(rows, tmp_path / "c.png", "made up"))
    assert [row["weights"] for row in found] == ["5", "7", "2"]
