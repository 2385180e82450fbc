"""2:4 weights: exact zeros, the same product, and an order that keeps most."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import torch
from hypothesis import given
from torch import Tensor

from autosparse.sparsity.two_four import best_order, kept_score, two_four


def sparse(rows: int, columns: int, density: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, columns, generator=generator)
    return drawn * (torch.rand(rows, columns, generator=generator) < density)


def test_by_hand() -> None:
    # The first four inputs are all heard and the last four not: two of each group are swapped.
    weight = torch.tensor([[5.0, 6, 7, 8, 0, 0, 0, 0], [1.0, 2, 3, 4, 0, 0, 0, 0]])
    found, order = two_four(weight)
    assert sorted(order.tolist()) == list(range(8))
    assert found.abs().sum() == weight.sum() == 36
    assert all(len(set(order[half].tolist()) & {0, 1, 2, 3}) == 2
               for half in (slice(0, 4), slice(4, 8)))  # fmt: skip


def test_no_swap_of_two_columns_would_keep_more() -> None:
    score = sparse(6, 16, 0.6).abs()
    score = score[:, best_order(score)]
    found = kept_score(score)
    for one, other in itertools.combinations(range(16), 2):
        order = list(range(16))
        order[one], order[other] = other, one
        assert kept_score(score[:, order]) <= found * (1 + 1e-5)


@given(st.integers(0, 99), st.floats(0.05, 1), st.integers(1, 30), st.integers(1, 12))
def test_zeros_are_exact_and_the_product_is_that_of_the_masked_weight(
    seed: int, density: float, rows: int, groups: int
) -> None:
    weight = sparse(rows, 4 * groups, density, seed).double()
    found, order = two_four(weight)
    assert ((found != 0).unflatten(1, (-1, 4)).sum(2) <= 2).all()
    back = torch.empty_like(found)
    back[:, order] = found  # The columns where they were.
    assert ((back == weight) | (back == 0)).all()
    x = torch.randn(5, 4 * groups, dtype=torch.float64)
    torch.testing.assert_close(x[:, order] @ found.t(), x @ back.t(), rtol=0, atol=1e-12)
    assert found.abs().sum() >= kept_score(weight.abs()) * (1 - 1e-6)


def test_a_weight_that_is_2_4_stays_as_it_is() -> None:
    weight = sparse(8, 16, 1.0)
    weight.unflatten(1, (-1, 4))[..., 1:3] = 0
    found, order = two_four(weight)
    assert order.tolist() == list(range(16))
    assert found.equal(weight)


def test_a_tenth_of_the_weights_is_kept_nearly_whole() -> None:
    weight = sparse(64, 64, 0.1)
    whole = float(weight.abs().sum())
    lost = whole - float(two_four(weight)[0].abs().sum())
    assert lost < 0.1 * (whole - kept_score(weight.abs()))
