"""The two heads: interpolation over density, ERK as the start, budgets met, fast path exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from autosparse.autos import features
from autosparse.autos.heads import CONSTANTS, Heads, erk_log_odds, interpolation
from autosparse.sparsity import masks

SHAPES = {"a": (8, 3, 3, 3), "b": (16, 8, 3, 3), "c": (10, 16)}


def example() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    weights, gradients = (
        {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for _ in range(2)
    )
    return weights, gradients


def heads(seed: int = 0) -> Heads:
    torch.manual_seed(seed)
    made = Heads((5, 4))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    made.mean.normal_()
    made.std.uniform_(0.5, 2.0)
    return made


def test_constants_come_last() -> None:
    weights, gradients = example()
    found = features.contexts(weights, gradients)
    pieces = features.layer_features("context", weights["a"], gradients["a"], found["a"])
    piece = torch.cat(list(pieces), dim=1)
    assert len(found["a"]) == CONSTANTS
    expected = torch.tensor(found["a"])
    assert torch.allclose(piece[-CONSTANTS:], expected[:, None].expand(-1, piece.shape[1]))


def test_interpolation_is_linear_in_log_density() -> None:
    known = (0.5, 0.25, 0.0625)
    assert interpolation(0.9, known) == [1, 0, 0]
    assert interpolation(0.01, known) == [0, 0, 1]
    assert interpolation(0.25, known) == pytest.approx([0, 1, 0])
    # 0.125 is half-way from 1/4 to 1/16 in powers of two.
    assert interpolation(0.125, known) == pytest.approx([0, 0.5, 0.5])


def test_erk_log_odds_by_hand() -> None:
    # Raw ERK densities (2 + 2) / 4 = 1 and (4 + 4) / 16 = 1/2: of 4 + 16 weights the shares are
    # 4 and 8, so half of the whole, 10 weights, is 10/3 and 20/3: 3 and 7.
    shapes = {"small": torch.Size((2, 2)), "large": torch.Size((4, 4))}
    found = erk_log_odds(shapes, 0.5)
    assert found["small"] == pytest.approx(math.log(3 / 1))
    assert found["large"] == pytest.approx(math.log(7 / 9))


@pytest.mark.parametrize("density", [0.5, 0.05, 0.01])
def test_a_head_that_knows_nothing_says_erk(density: float) -> None:
    weights, gradients = example()
    shapes = {name: weight.shape for name, weight in weights.items()}
    found = Heads().layer_densities(shapes, features.contexts(weights, gradients), density)
    for name, odds in erk_log_odds(shapes, density).items():
        assert found[name] == pytest.approx(1 / (1 + math.exp(-odds)), abs=0.02)


@pytest.mark.parametrize("density", [0.7, 0.3, 0.07, 0.005])
def test_expected_survivors_meet_the_budget(density: float) -> None:
    weights, gradients = example()
    shapes = {name: weight.shape for name, weight in weights.items()}
    found = heads().layer_densities(shapes, features.contexts(weights, gradients), density)
    expected = sum(found[name] * weights[name].numel() for name in weights)
    assert expected == pytest.approx(density * masks.total(weights), rel=1e-4)
    assert all(0 < each < 1 for each in found.values())


@pytest.mark.parametrize("density", [0.5, 0.1])
def test_the_fast_path_is_the_network(density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "CHUNK", 64)
    made, (weights, gradients) = heads(), example()
    found = features.contexts(weights, gradients)
    mix = torch.tensor(interpolation(density, made.densities))
    for name, weight in weights.items():
        pieces = features.layer_features("context", weight, gradients[name], found[name])
        expected = made.weights_say(torch.cat(list(pieces), dim=1).T) @ mix
        scores = made.weight_scores(weight, gradients[name], found[name], density)
        torch.testing.assert_close(scores.flatten(), expected.detach(), rtol=1e-4, atol=1e-5)
