"""The table of a function of two numbers: exact on the grid, near in between, flat outside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autosparse.autos.table import GRID, Table


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2000, 2, generator=generator) * torch.tensor([0.1, 1e-4])


def curved(pairs: Tensor) -> Tensor:
    return torch.tanh(pairs[:, 0].abs() / 0.1) + 0.5 * torch.cos(pairs[:, 1] / 1e-4)


def test_the_table_holds_the_function_on_its_grid() -> None:
    table = Table.distilled(curved, inputs())
    places = torch.tensor([0, 7, GRID // 2, GRID - 1])
    axis = torch.linspace(-1, 1, GRID)[places]
    ticks = torch.sinh(axis[:, None] * table.reach) * table.scale
    expected = curved(ticks)
    found = table(ticks[:, 0], ticks[:, 1])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_weight_and_gradient_are_not_mixed_up() -> None:
    table = Table.distilled(lambda pairs: pairs[:, 0], inputs())
    weight, gradient = torch.tensor([[0.05, -0.12]]), torch.tensor([[1e-4, -3e-4]])
    torch.testing.assert_close(table(weight, gradient), weight, rtol=0.01, atol=1e-3)


def test_the_error_on_the_card_is_that_of_the_points() -> None:
    pairs = inputs()
    table = Table.distilled(curved, pairs)
    error = (table(pairs[:, 0], pairs[:, 1]) - curved(pairs)).abs()
    card = table.errors(curved, pairs)
    assert card["max_error"] == pytest.approx(float(error.max()))
    assert card["mean_error"] == pytest.approx(float(error.mean()))
    assert 0 < card["max_error"] < 0.02


def test_far_outside_the_edge_counts() -> None:
    table = Table.distilled(curved, inputs())
    edge = torch.sinh(table.reach) * table.scale
    far = table(1e3 * edge[:1], 1e3 * edge[1:])
    torch.testing.assert_close(far, table(edge[:1], edge[1:]), rtol=1e-4, atol=1e-5)
