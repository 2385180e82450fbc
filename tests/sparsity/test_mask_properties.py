"""Masks of any scores: exact counts, ties by position, guards; counts split over any layers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from autosparse.sparsity import masks
from autosparse.sparsity.counts import keep_count

SHAPES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=4)


@st.composite
def scored(draw: st.DrawFn) -> dict[str, Tensor]:
    """A few small layers whose scores are often equal."""
    few = st.integers(-2, 2).map(float)
    return {
        f"layer{number}": torch.tensor(
            draw(st.lists(few, min_size=rows * columns, max_size=rows * columns))
        ).view(rows, columns)
        for number, (rows, columns) in enumerate(draw(SHAPES))
    }


def in_order(scores: dict[str, Tensor]) -> list[tuple[str, int]]:
    """Every weight's place, best first; of equal ones the first, by layer and position."""
    places = [
        (-score, layer, place)
        for layer, (_, tensor) in enumerate(scores.items())
        for place, score in enumerate(tensor.flatten().tolist())
    ]
    names = list(scores)
    return [(names[layer], place) for _, layer, place in sorted(places)]


def places(chosen: dict[str, Tensor]) -> set[tuple[str, int]]:
    return {(n, place) for n, mask in chosen.items() for place in np.flatnonzero(mask.numpy())}


@given(scored(), st.data())
def test_the_best_are_kept_and_of_equal_ones_the_first(scores, data) -> None:
    count = data.draw(st.integers(0, masks.total(scores)))
    chosen = masks.keep(scores, count, min_per_layer=0)
    assert places(chosen) == set(in_order(scores)[:count])
    assert {name: mask.shape for name, mask in chosen.items()} == {
        name: score.shape for name, score in scores.items()
    }


@given(scored(), st.data())
def test_guards_keep_the_best_of_each_layer_and_the_count_stays(scores, data) -> None:
    floor = data.draw(st.integers(0, 3))
    least = {name: min(floor, score.numel()) for name, score in scores.items()}
    count = data.draw(st.integers(sum(least.values()), masks.total(scores)))
    chosen = masks.keep(scores, count, min_per_layer=floor)
    assert masks.kept(chosen) == count
    guarded = {
        (name, place)
        for name, score in scores.items()
        for _, place in in_order({name: score})[: least[name]]
    }
    expected = [*sorted(guarded), *(each for each in in_order(scores) if each not in guarded)]
    assert places(chosen) == set(expected[:count])


@given(scored(), st.data())
def test_what_is_gone_stays_gone(scores, data) -> None:
    """Masks within masks are nested, and have their counts."""
    outer_count = data.draw(st.integers(len(scores), masks.total(scores)))
    outer = masks.keep(scores, outer_count)
    count = data.draw(st.integers(len(scores), outer_count))
    others = {name: -score for name, score in scores.items()}
    for scope in masks.SCOPES:
        inner = masks.keep(others, count, within=outer, scope=scope)
        assert masks.kept(inner) == count
        assert places(inner) <= places(outer)


@given(scored(), st.integers(1, 4), st.integers(1, 4))
def test_n_of_m_keeps_the_best_n_of_each_m_neighbours(scores, n, m) -> None:
    assume(n <= m)
    chosen = masks.n_of_m(scores, n, m)
    for name, score in scores.items():
        if score.shape[1] % m:
            assert chosen[name].all()
            continue
        for row, mask in zip(score.view(-1, m), chosen[name].view(-1, m), strict=True):
            expected = {place for _, place in in_order({"": row})[:n]}
            assert set(np.flatnonzero(mask.numpy())) == expected


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 3))
def test_a_packed_mask_comes_back(bits, rows) -> None:
    mask = torch.tensor(bits * rows, dtype=torch.bool).view(rows, len(bits))
    packed = masks.pack(mask)
    assert (packed.dtype, len(packed)) == (torch.uint8, -(-mask.numel() // 8))
    assert torch.equal(masks.unpack(packed, mask.shape), mask)


@given(scored(), st.data())
def test_a_fingerprint_tells_every_bit(scores, data) -> None:
    chosen = {name: score > 0 for name, score in scores.items()}
    before = masks.fingerprint(chosen)
    assert masks.fingerprint(dict(reversed(chosen.items()))) == before
    name = data.draw(st.sampled_from(sorted(chosen)))
    place = data.draw(st.integers(0, chosen[name].numel() - 1))
    changed = {**chosen, name: chosen[name].clone()}
    changed[name].view(-1)[place] ^= True
    assert masks.fingerprint(changed) != before


@given(st.integers(0, 10**9), st.integers(0, 999))
def test_the_decimal_that_was_written_is_meant(total, thousandths) -> None:
    """And half a weight is removed: kept = ceil(total * density - 1/2)."""
    exact = Fraction(total * (1000 - thousandths), 1000)
    kept = keep_count(total, thousandths / 1000)
    assert kept - exact < Fraction(1, 2) and exact - kept <= Fraction(1, 2)


@given(st.data())
def test_a_budget_is_split_exactly_within_bounds_and_in_proportion(data) -> None:
    sizes = {f"{n}": size for n, size in enumerate(data.draw(
        st.lists(st.integers(1, 50), min_size=1, max_size=6)))}  # fmt: skip
    weights = {name: data.draw(st.floats(0, 4)) for name in sizes}
    least = {name: data.draw(st.integers(0, 3)) for name in sizes}
    most = {name: data.draw(st.integers(1, size)) for name, size in sizes.items()}
    lower = {name: min(least[name], most[name]) for name in sizes}
    kept = data.draw(st.integers(sum(lower.values()), sum(most.values())))
    counts = masks.allocate(weights, sizes, kept, least, most=most)
    assert list(counts) == list(sizes)
    assert sum(counts.values()) == kept
    assert all(lower[name] <= counts[name] <= most[name] for name in sizes)
    free = [name for name in sizes if lower[name] < counts[name] < most[name]]
    for first in free:  # Between two that no bound holds, only rounding parts the densities.
        for second in free:
            share = weights[first] * sizes[first], weights[second] * sizes[second]
            if min(share) > 0:
                gap = (counts[first] + 1) / share[0] - (counts[second] - 1) / share[1]
                assert gap > -1e-9
