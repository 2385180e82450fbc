"""AutoS's pictures: the surface of a network made by hand, and a calibration worked out by hand."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch

from autosparse.autos.network import AutoS
from autosparse.core.errors import UsageError
from autosparse.corpus.store import Corpus, write_run
from autosparse.report import autos_figures
from tests.conftest import tiny_run


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


def test_calibration_takes_weights_in_order_of_prediction(tmp_path: Path):
    guess = torch.arange(40.0).flip(0)
    truth = (guess >= 20).float()
    path = autos_figures.calibration([("m", guess, truth)], tmp_path / "c.png", "t")
    rows = rows_of(path)
    assert len(rows) == autos_figures.GROUPS
    assert [float(row["predicted"]) for row in rows] == [2 * n + 0.5 for n in range(20)]
    assert [float(row["true"]) for row in rows] == [0.0] * 10 + [1.0] * 10


def test_another_corpus_is_refused(tmp_path: Path):
    write_run(tmp_path / "run1", tiny_run("run1"))
    network = linear("paper", {})
    network.card = {"held_out": ["run7"], "config": {"rows_per_run": 10}}
    with pytest.raises(UsageError, match="run7 is not there"):
        autos_figures.predictions(network, Corpus(tmp_path))


def test_odds_calibration(tmp_path: Path) -> None:
    rows = [
        {"predicted": 0.0, "alive": 0.01, "weights": 5},
        {"predicted": 0.5, "alive": 0.4, "weights": 7},
        {"predicted": 1.0, "alive": 1.0, "weights": 2},
    ]
    found = rows_of(autos_figures.odds_calibration(rows, tmp_path / "c.png", "made up"))
    assert [row["weights"] for row in found] == ["5", "7", "2"]


def test_frontier(tmp_path: Path) -> None:
    rows = [
        {"label": "dense", "accuracy": 0.6, "spread": 0.0, "cost_share": 0.0},
        {"label": "erk", "accuracy": 0.5, "spread": 0.01, "cost_share": 0.0},
        {"label": "autos_irp", "accuracy": 0.55, "spread": 0.02, "cost_share": 0.05},
    ]
    found = rows_of(autos_figures.frontier(rows, tmp_path / "f.png", "made up"))
    assert [row["label"] for row in found] == ["dense", "erk", "autos_irp"]
