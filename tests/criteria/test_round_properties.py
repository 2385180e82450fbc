"""Pruning in rounds, for any weights: the schedule ends at the budget, and rounds are nested."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from autosparse.criteria.rounds import counts, shrink
from autosparse.sparsity import masks
from autosparse.sparsity.counts import keep_count

SPARSITIES = st.integers(0, 99).map(lambda percent: percent / 100)


@given(st.integers(1, 10**6), SPARSITIES, st.integers(1, 30))
def test_the_schedule_falls_and_ends_at_the_budget(total, sparsity, number) -> None:
    found = list(counts(total, sparsity, number))
    assert len(found) == number
    assert found == sorted(found, reverse=True)
    assert found[0] <= total
    assert found[-1] == keep_count(total, sparsity)


@given(st.data())
def test_rounds_are_nested_and_have_their_counts(data) -> None:
    """Gradients change from round to round; what has fallen stays below what falls later."""
    sizes = data.draw(st.lists(st.integers(2, 40), min_size=1, max_size=3))
    number, seed = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 99))
    floor = data.draw(st.integers(0, 1))
    sparsity = data.draw(SPARSITIES.filter(lambda s: keep_count(sum(sizes), s) >= len(sizes)))
    generator = torch.Generator().manual_seed(seed)
    weights = {
        f"{n}": torch.randint(1, 4, (size,), generator=generator).float()
        for n, size in enumerate(sizes)
    }
    alive: list[torch.Tensor] = []

    def gradient(take):
        alive.append(torch.cat([weight != 0 for weight in weights.values()]))
        for place, size in enumerate(sizes):
            take(place, torch.randint(1, 4, (size,), generator=generator).float())

    found = shrink(weights, gradient, sparsity, number, min_per_layer=floor)
    scores = torch.cat(list(found.values()))
    expected = [sum(sizes), *counts(sum(sizes), sparsity, number)]
    for level, count in enumerate(expected[:-1]):
        assert int(alive[level].sum()) == count
    for earlier, later in pairwise(alive):
        assert bool((later <= earlier).all())
        gone = earlier & ~later
        if gone.any():
            assert float(scores[gone].max()) < float(scores[later].min())
    chosen = masks.from_scores(found, sparsity, min_per_layer=floor)
    assert masks.kept(chosen) == expected[-1]
    assert all(int(mask.sum()) >= floor for mask in chosen.values())
    assert bool((torch.cat(list(chosen.values())) <= alive[-1]).all())
