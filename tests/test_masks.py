"""Masks: exact counts, ties by position, guards, allocation, packing, fingerprint."""

from __future__ import annotations

import hashlib
import random
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from autosparse import masks
from autosparse.errors import UsageError

SPARSITIES = ("0", "0.05", "0.125", "0.35", "0.5", "0.7", "0.9", "0.95", "0.98", "0.99", "0.995")


def scores_of(**layers: list[float]) -> dict[str, Tensor]:
    return {name: torch.tensor(values) for name, values in layers.items()}


def random_scores(*sizes: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{n}": torch.rand(size, generator=generator) for n, size in enumerate(sizes)}


def counts_of(chosen: dict[str, Tensor]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in chosen.items()}


def positions(mask: Tensor) -> list[int]:
    return mask.flatten().nonzero().squeeze(1).tolist()


# Counts


@pytest.mark.parametrize("scope", masks.SCOPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("sizes", [(1001, 2998), (333, 334, 334), (12_345, 777), (501, 500)])
def test_the_count_is_exact(sizes: tuple[int, ...], sparsity: str, scope: str) -> None:
    written = Fraction(sparsity)
    twice_removed = 2 * sum(sizes) * written.numerator
    removed = (twice_removed + written.denominator) // (2 * written.denominator)
    chosen = masks.from_scores(random_scores(*sizes), float(sparsity), scope=scope)
    assert masks.kept(chosen) == sum(sizes) - removed


@pytest.mark.parametrize(
    ("total", "sparsity", "kept"),
    [(1000, 0.95, 50), (1000, 0.07, 930), (10, 0.25, 7), (10, 0.35, 6), (101, 0.98, 2), (7, 0, 7)],
)
def test_counts_worked_out_by_hand(total: int, sparsity: float, kept: int) -> None:
    assert masks.kept(masks.from_scores(random_scores(total), sparsity)) == kept


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1, float("nan")])
def test_sparsity_out_of_range(sparsity: float) -> None:
    with pytest.raises(UsageError, match="sparsity"):
        masks.from_scores(random_scores(10), sparsity)


def test_masks_have_the_names_order_and_shapes_of_the_scores() -> None:
    scores = {"z": torch.rand(2, 3, 1, 1), "a": torch.rand(4, 5)}
    chosen = masks.from_scores(scores, 0.5)
    assert [(name, tuple(mask.shape)) for name, mask in chosen.items()] == [
        ("z", (2, 3, 1, 1)),
        ("a", (4, 5)),
    ]
    assert all(mask.dtype == torch.bool for mask in chosen.values())


def test_sparsity_and_kept_of_masks() -> None:
    chosen = {"a": torch.tensor([True, False]), "b": torch.tensor([False] * 6)}
    assert masks.kept(chosen) == 1
    assert masks.sparsity(chosen) == 0.875


@pytest.mark.parametrize("scope", masks.SCOPES)
def test_scores_are_not_changed(scope: str) -> None:
    scores = scores_of(a=[5.0, 4.0, 3.0, 1.0])
    within = {"a": torch.tensor([True, True, False, True])}
    masks.keep(scores, 2, scope=scope, within=within)
    assert scores["a"].tolist() == [5.0, 4.0, 3.0, 1.0]


# Selection and ties


def test_the_highest_are_kept() -> None:
    chosen = masks.keep(scores_of(a=[0.1, 0.9, -1.0], b=[0.5, 0.2, 0.8]), 3)
    assert chosen["a"].tolist() == [False, True, False]
    assert chosen["b"].tolist() == [True, False, True]


def test_ties_go_to_the_first_parameter_and_position() -> None:
    chosen = masks.keep(scores_of(b=[1.0] * 4, a=[1.0] * 4), 6)
    assert positions(chosen["b"]) == [0, 1, 2, 3]
    assert positions(chosen["a"]) == [0, 1]


def test_ties_at_the_threshold_only() -> None:
    assert positions(masks.top(torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0]), 2)) == [1, 4]


@pytest.mark.parametrize("count", [0, 1, 7, 50, 99, 100])
def test_top_agrees_with_a_stable_sort(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    flat = torch.randint(0, 4, (100,), generator=generator).float()
    order = sorted(range(100), key=lambda place: -flat[place].item())
    assert positions(masks.top(flat, count)) == sorted(order[:count])


def test_scope_layer_keeps_the_best_of_every_layer_at_the_same_density() -> None:
    scores = scores_of(a=[1.0, 2.0, 3.0, 4.0], b=[50.0, 10.0, 40.0, 20.0, 30.0, 60.0])
    chosen = masks.keep(scores, 5, scope="layer")
    assert positions(chosen["a"]) == [2, 3]
    assert positions(chosen["b"]) == [0, 2, 5]


def test_unknown_scope_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"scope 'layers'.*'layer'"):
        masks.keep(random_scores(4), 2, scope="layers")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scope", masks.SCOPES)
def test_scores_that_are_not_finite_name_their_layer(scope: str, bad: float) -> None:
    with pytest.raises(UsageError, match="second"):
        masks.keep(scores_of(first=[1.0, 2.0], second=[0.0, bad]), 2, scope=scope)


# Guard


def test_every_layer_keeps_its_best_weight() -> None:
    chosen = masks.keep(scores_of(a=[9.0, 8.0, 7.0, 6.0], b=[1.0, 3.0, 2.0, 0.0]), 3)
    assert positions(chosen["a"]) == [0, 1]
    assert positions(chosen["b"]) == [1]


def test_every_layer_keeps_as_many_as_asked() -> None:
    scores = scores_of(a=[9.0, 8.0, 7.0, 6.0], b=[1.0, 3.0, 2.0, 0.0], c=[0.5])
    chosen = masks.keep(scores, 5, min_per_layer=2)
    assert positions(chosen["a"]) == [0, 1]
    assert positions(chosen["b"]) == [1, 2]
    assert positions(chosen["c"]) == [0]


def test_the_guard_changes_nothing_where_no_layer_is_empty() -> None:
    scores = random_scores(50, 30, 20)
    guarded, free = masks.keep(scores, 40), masks.keep(scores, 40, min_per_layer=0)
    assert masks.first_empty(free) is None
    assert all(torch.equal(guarded[name], free[name]) for name in scores)


def test_layer_collapse_where_it_is_allowed() -> None:
    scores = scores_of(a=[9.0, 8.0], b=[1.0, 2.0], c=[0.0, 7.0])
    chosen = masks.keep(scores, 3, min_per_layer=0)
    assert counts_of(chosen) == {"a": 2, "b": 0, "c": 1}
    assert masks.first_empty(chosen) == "b"
    assert masks.first_empty(masks.keep(scores, 3)) is None


@pytest.mark.parametrize("scope", masks.SCOPES)
def test_too_few_weights_for_all_layers(scope: str) -> None:
    with pytest.raises(UsageError, match="2 weights"):
        masks.keep(random_scores(5, 5, 5), 2, scope=scope)


# Within


def test_the_result_lies_within() -> None:
    within = {"a": torch.tensor([False, True, True, False]), "b": torch.tensor([True, False])}
    chosen = masks.keep(scores_of(a=[9.0, 1.0, 2.0, 8.0], b=[3.0, 7.0]), 2, within=within)
    assert positions(chosen["a"]) == [2]
    assert positions(chosen["b"]) == [0]


def test_the_guard_stays_within() -> None:
    within = {"a": torch.tensor([True, True, True]), "b": torch.tensor([False, True, True])}
    chosen = masks.keep(scores_of(a=[9.0, 8.0, 7.0], b=[3.0, 1.0, 2.0]), 3, within=within)
    assert positions(chosen["a"]) == [0, 1]
    assert positions(chosen["b"]) == [2]


def test_the_guard_stays_within_where_a_layer_has_fewer_than_asked() -> None:
    within = {"a": torch.tensor([True] * 4), "b": torch.tensor([False, True, False])}
    scores = scores_of(a=[9.0, 8.0, 7.0, 6.0], b=[3.0, 1.0, 2.0])
    chosen = masks.keep(scores, 4, within=within, min_per_layer=2)
    assert positions(chosen["a"]) == [0, 1, 2]
    assert positions(chosen["b"]) == [1]


@pytest.mark.parametrize("scope", masks.SCOPES)
def test_what_is_gone_stays_gone_over_many_rounds(scope: str) -> None:
    within = {name: torch.ones(size).bool() for name, size in (("layer0", 60), ("layer1", 23))}
    for number, count in enumerate(range(82, 2, -1)):
        scores = random_scores(60, 23, seed=number)
        smaller = masks.keep(scores, count, scope=scope, within=within)
        assert masks.kept(smaller) == count
        assert not any((smaller[name] & ~within[name]).any() for name in within)
        within = smaller


def test_scope_layer_stays_within_where_largest_remainders_would_give_a_layer_more() -> None:
    scores = random_scores(6, 6, 2)
    before = masks.keep(scores, 11, scope="layer")
    after = masks.keep(scores, 10, scope="layer", within=before)
    assert masks.kept(after) == 10
    assert not any((after[name] & ~before[name]).any() for name in scores)


@pytest.mark.parametrize("scope", masks.SCOPES)
def test_more_weights_than_lie_within(scope: str) -> None:
    within = {"layer0": torch.tensor([True, False, False]), "layer1": torch.tensor([False] * 3)}
    with pytest.raises(UsageError):
        masks.keep(random_scores(3, 3), 2, scope=scope, min_per_layer=0, within=within)


# Allocation


@pytest.mark.parametrize(
    ("weights", "sizes", "kept", "least", "expected"),
    [
        pytest.param([1, 3], [10, 10], 8, 1, [2, 6], id="in proportion"),
        pytest.param([1, 1], [30, 10], 20, 1, [15, 5], id="same density"),
        pytest.param([10, 1, 1], [4, 10, 10], 12, 1, [4, 4, 4], id="one full layer"),
        # Shares 18, 12, 20: the first is full at 2; of 18 left the second would get 6.75 of 6.
        pytest.param([9, 2, 1], [2, 6, 20], 20, 1, [2, 6, 12], id="full one after the other"),
        pytest.param([1, 1, 1], [10, 10, 10], 11, 1, [4, 4, 3], id="equal remainders: by order"),
        pytest.param([1, 1, 1], [5, 3, 2], 6, 1, [3, 2, 1], id="largest remainder"),
        pytest.param([1, 1], [100, 2], 10, 1, [9, 1], id="at least one"),
        pytest.param([1, 1], [100, 2], 10, 0, [10, 0], id="none is allowed"),
        pytest.param([1, 1], [3, 100], 10, 5, [3, 7], id="least is more than a layer has"),
        pytest.param([0, 0], [4, 4], 5, 0, [3, 2], id="no preference at all"),
        pytest.param([1, 1], [3, 4], 7, 1, [3, 4], id="everything"),
        pytest.param([1, 0, 0, 0], [10, 10, 10, 10], 11, 1, [8, 1, 1, 1], id="full, yet others 1"),
    ],
)
def test_allocations_worked_out_by_hand(
    weights: list[float], sizes: list[int], kept: int, least: int, expected: list[int]
) -> None:
    names = "abcd"[: len(sizes)]
    found = masks.allocate(
        dict(zip(names, weights, strict=True)), dict(zip(names, sizes, strict=True)), kept, least
    )
    assert found == dict(zip(names, expected, strict=True))


def filled(shares: list[Fraction], least: list[int], most: list[int], water: Fraction) -> Fraction:
    """Return what all layers hold when layer i is filled to water * share within its bounds."""
    parts = zip(shares, least, most, strict=True)
    return sum((min(max(water * share, low), high) for share, low, high in parts), Fraction())


def water_level(
    shares: list[Fraction], least: list[int], most: list[int], kept: int
) -> Fraction | None:
    """Return the level at which the layers hold `kept` in all; it is linear between the bends."""
    bends = {
        bound / share
        for share, pair in zip(shares, zip(least, most, strict=True), strict=True)
        for bound in pair
    }
    levels = sorted({Fraction(0), *bends})
    for low, high in pairwise(levels):
        below, above = filled(shares, least, most, low), filled(shares, least, most, high)
        if below <= kept <= above and below < above:
            return low + (high - low) * (kept - below) / (above - below)
    return None


@pytest.mark.parametrize("seed", range(8))
def test_allocation_is_water_filling_between_least_and_all(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(100):
        number, least = draw.randint(1, 6), draw.randint(0, 3)
        sizes = [draw.randint(1, 30) for _ in range(number)]
        weights = [Fraction(draw.randint(1, 1000) ** 3, 10**9) for _ in range(number)]
        low = [min(least, size) for size in sizes]
        kept = draw.randint(sum(low), sum(sizes))
        shares = [weight * size for weight, size in zip(weights, sizes, strict=True)]
        found = masks.allocate(dict(enumerate(weights)), dict(enumerate(sizes)), kept, least)
        assert sum(found.values()) == kept
        level = water_level(shares, low, sizes, kept)
        for place, share in enumerate(shares):
            assert low[place] <= found[place] <= sizes[place]
            if level is not None:
                ideal = min(max(level * share, low[place]), sizes[place])
                assert abs(found[place] - ideal) < 1


@pytest.mark.parametrize("kept", [1, 9])
def test_impossible_allocations(kept: int) -> None:
    with pytest.raises(UsageError, match=f"{kept} weights cannot be split over 2 layers"):
        masks.allocate({"a": 1.0, "b": 1.0}, {"a": 4, "b": 4}, kept)


# Packing


def test_bits_are_packed_row_major_highest_first() -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert masks.pack(mask).tolist() == [0b10100100]


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 5), (7, 3, 3, 3), (13, 1), (0, 4)])
def test_pack_and_unpack(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
    bits = masks.pack(mask)
    assert bits.dtype == torch.uint8
    assert bits.shape == ((mask.numel() + 7) // 8,)
    assert torch.equal(masks.unpack(bits, shape), mask)


def test_pack_takes_masks_that_are_not_contiguous() -> None:
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)).t() > 0.5
    assert torch.equal(masks.unpack(masks.pack(mask), mask.shape), mask)


# Fingerprint


def test_fingerprint_is_the_hash_of_names_shapes_and_bits() -> None:
    chosen = {"w": torch.tensor([[True, False, True], [False, True, False]])}
    digest = hashlib.sha256(b'["w", [2, 3]]' + bytes([0b10101000])).hexdigest()
    assert masks.fingerprint(chosen) == digest[:16]


@pytest.mark.parametrize("place", [0, 8, 14])
def test_fingerprint_sees_one_bit(place: int) -> None:
    before = torch.ones(15, dtype=torch.bool)
    after = before.clone()
    after[place] = False
    assert masks.fingerprint({"w": before}) != masks.fingerprint({"w": after})


def test_fingerprint_sees_name_and_shape() -> None:
    mask = torch.tensor([True] * 6 + [False] * 2)
    others = [{"v": mask}, {"w": mask.view(2, 4)}, {"w": mask[:7]}, {"w": mask, "v": mask[:0]}]
    found = {masks.fingerprint(each) for each in ({"w": mask}, *others)}
    assert len(found) == 5


def test_fingerprint_does_not_depend_on_the_order_of_names() -> None:
    a, b = torch.tensor([True, False]), torch.tensor([False, True, True])
    assert masks.fingerprint({"a": a, "b": b}) == masks.fingerprint({"b": b, "a": a})
