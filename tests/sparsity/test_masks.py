"""Masks: exact counts, ties by position, guards, allocation, packing, fingerprint."""

from __future__ import annotations

import hashlib
import random
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from autosparse.core.errors import UsageError
from autosparse.sparsity import masks

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


# Large tensors: the threshold is guessed first

LARGE = 64 * masks.SAMPLE + 4321
STRIDE = 67
"""Which values are sampled: the first number from 64 on without a factor of 2, 3, 5 or 7."""


def sampled_places_are_high() -> Tensor:
    """Every value that is looked at first is above every other: the guess is useless."""
    flat = torch.rand(LARGE, generator=torch.Generator().manual_seed(0))
    flat[::STRIDE] += 10
    return flat


def with_gone(share: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    flat = torch.randn(LARGE, generator=generator)
    flat[torch.rand(LARGE, generator=generator) < share] = -torch.inf
    return flat


LARGE_ONES = {
    "normal": lambda: torch.randn(LARGE, generator=torch.Generator().manual_seed(0)),
    "many ties": lambda: torch.randint(
        0, 5, (LARGE,), generator=torch.Generator().manual_seed(0)
    ).float(),
    "constant": lambda: torch.full((LARGE,), 0.25),
    "sorted": lambda: torch.arange(LARGE).float(),
    "reverse-sorted": lambda: torch.arange(LARGE, 0, -1).float(),
    "half gone": lambda: with_gone(0.5),
    "nearly all gone": lambda: with_gone(0.9999),
    "a wrong guess": sampled_places_are_high,
    "bfloat16": lambda: torch.randn(LARGE, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "double": lambda: torch.randn(
        LARGE, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).mul_(1e-12).add_(1),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE_ONES)
def test_top_of_a_large_tensor_agrees_with_a_stable_sort(name: str) -> None:
    flat = LARGE_ONES[name]()
    assert flat.numel() > 64 * masks.SAMPLE
    before = flat.clone()
    order = flat.double().sort(descending=True, stable=True).indices
    for count in (1, 1000, LARGE // 20, LARGE // 2, LARGE - 1000, LARGE - 1):
        expected = torch.zeros(LARGE, dtype=torch.bool)
        expected[order[:count]] = True
        assert torch.equal(masks.top(flat, count), expected), count
    assert torch.equal(flat, before)


def test_a_short_tensor_has_no_bounds() -> None:
    flat = torch.rand(8 * masks.SAMPLE)
    assert masks.bounds([flat], 5) == (-float("inf"), float("inf"))


@pytest.mark.parametrize("name", ["normal", "many ties", "sorted", "half gone"])
@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.95])
def test_bounds_are_close_around_the_threshold(name: str, share: float) -> None:
    flat = LARGE_ONES[name]()
    count = int(LARGE * share)
    threshold = flat.sort(descending=True).values[count - 1]
    low, high = masks.bounds([flat], count)
    assert low <= threshold <= high
    if name != "many ties" and threshold > -torch.inf:
        between = int(((flat >= max(low, -1e30)) & (flat <= high)).sum())
        assert between < 0.15 * LARGE


def test_bounds_are_close_where_one_place_of_every_kernel_has_a_gradient() -> None:
    """As in 3x3 kernels over images of one pixel, where every 9th value was the sample."""
    flat = torch.zeros(72 * masks.SAMPLE)
    flat[4::9] = torch.rand(8 * masks.SAMPLE, generator=torch.Generator().manual_seed(0))
    count = masks.SAMPLE
    low, high = masks.bounds([flat], count)
    assert low <= flat.sort(descending=True).values[count - 1] <= high
    assert int((flat >= low).sum()) < 2 * count


def test_a_layer_of_that_size_is_pruned_exactly() -> None:
    scores = {"small": torch.rand(300), "large": LARGE_ONES["many ties"]()}
    chosen = masks.from_scores(scores, 0.9)
    assert masks.kept(chosen) == LARGE + 300 - int(0.9 * (LARGE + 300) + 0.5)
    assert counts_of(chosen)["small"] >= 1


# Guard: channels


def shaped_scores(*shapes: tuple[int, ...], seed: int = 0, levels: int = 0) -> dict[str, Tensor]:
    """Return random scores; with few `levels` there are many ties."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for number, shape in enumerate(shapes):
        score = torch.rand(shape, generator=generator)
        found[f"layer{number}"] = (score * levels).floor() if levels else score
    return found


def best_of_channels_first(
    scores: dict[str, Tensor], count: int, within: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Choose in plain Python: the first best weight of every channel, then the best of all."""
    chosen = {name: torch.zeros(score.shape, dtype=torch.bool) for name, score in scores.items()}
    rest = []
    for layer, (name, score) in enumerate(scores.items()):
        inside = torch.ones(score.shape).bool() if within is None else within[name]
        for channel, (row, mine) in enumerate(
            zip(score.flatten(1), inside.flatten(1), strict=True)
        ):
            places = [place for place in range(len(row)) if mine[place]]
            if not places:
                continue
            best = max(places, key=lambda place, row=row: (row[place].item(), -place))
            chosen[name].flatten(1)[channel, best] = True
            rest += [
                (-row[place].item(), layer, channel, place, name)
                for place in places
                if place != best
            ]
    missing = count - sum(int(mask.sum()) for mask in chosen.values())
    for _, _, channel, place, name in sorted(rest)[:missing]:
        chosen[name].flatten(1)[channel, place] = True
    return chosen


SHAPES = ((6, 5), (4, 3, 3, 3), (8, 1, 3, 3))


@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("count", [18, 19, 40, 120, 209, 210])
def test_every_channel_keeps_its_best_weight(count: int, levels: int) -> None:
    scores = shaped_scores(*SHAPES, levels=levels)
    before = {name: score.clone() for name, score in scores.items()}
    chosen = masks.keep(scores, count, per_channel=True)
    expected = best_of_channels_first(scores, count)
    assert masks.kept(chosen) == count
    assert all(mask.flatten(1).any(1).all() for mask in chosen.values())
    assert all(torch.equal(chosen[name], expected[name]) for name in scores)
    assert all(torch.equal(scores[name], before[name]) for name in scores)


@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("count", [18, 30, 100])
def test_every_channel_keeps_its_best_weight_in_scope_layer(count: int, levels: int) -> None:
    scores = shaped_scores(*SHAPES, levels=levels)
    before = {name: score.clone() for name, score in scores.items()}
    chosen = masks.keep(scores, count, per_channel=True, scope="layer")
    assert masks.kept(chosen) == count
    for name, score in scores.items():
        mine = int(chosen[name].sum())
        assert mine >= len(score)
        expected = best_of_channels_first({name: score}, mine)[name]
        assert torch.equal(chosen[name], expected)
    assert all(torch.equal(scores[name], before[name]) for name in scores)


def test_channels_take_from_other_layers_only_what_they_need() -> None:
    """By hand: of ten, four hold the channels of b; the other six are the best of a."""
    scores = {"a": torch.arange(8.0).view(1, 8) + 10, "b": torch.arange(8.0).view(4, 2)}
    chosen = masks.keep(scores, 10, per_channel=True)
    assert positions(chosen["a"]) == [2, 3, 4, 5, 6, 7]
    assert positions(chosen["b"]) == [1, 3, 5, 7]


@pytest.mark.parametrize("scope", masks.SCOPES)
@pytest.mark.parametrize("seed", range(5))
def test_channels_that_are_gone_stay_gone(scope: str, seed: int) -> None:
    scores = shaped_scores(*SHAPES, seed=seed, levels=4)
    within = masks.keep(shaped_scores(*SHAPES, seed=seed + 50), 110)
    within["layer0"][2] = False
    within["layer1"][3] = False
    count = 40
    chosen = masks.keep(scores, count, scope=scope, per_channel=True, within=within)
    assert masks.kept(chosen) == count
    for name, mask in chosen.items():
        assert not (mask & ~within[name]).any()
        alive = within[name].flatten(1).any(1)
        assert torch.equal(mask.flatten(1).any(1), alive)
        if scope == "layer":
            mine = best_of_channels_first({name: scores[name]}, int(mask.sum()), within)[name]
            assert torch.equal(mask, mine)
    if scope == "global":
        expected = best_of_channels_first(scores, count, within)
        assert all(torch.equal(chosen[name], expected[name]) for name in scores)


@pytest.mark.parametrize("scope", masks.SCOPES)
def test_too_few_weights_for_all_channels(scope: str) -> None:
    scores = shaped_scores(*SHAPES)
    with pytest.raises(UsageError, match=r"17 weights.*channel"):
        masks.keep(scores, 17, scope=scope, per_channel=True)
    assert masks.kept(masks.keep(scores, 18, scope=scope, per_channel=True)) == 18


@pytest.mark.parametrize("scope", masks.SCOPES)
def test_channels_that_are_gone_need_no_weight(scope: str) -> None:
    """Two channels of four are left, and two weights are enough for them."""
    within = {"layer0": torch.tensor([True, False, True, False])[:, None].expand(4, 3)}
    chosen = masks.keep(shaped_scores((4, 3)), 2, scope=scope, per_channel=True, within=within)
    assert chosen["layer0"].sum(1).tolist() == [1, 0, 1, 0]


def test_layers_that_are_gone_need_no_weight() -> None:
    within = {"layer0": torch.ones(4).bool(), "layer1": torch.zeros(4).bool()}
    chosen = masks.keep(random_scores(4, 4), 1, within=within)
    assert counts_of(chosen) == {"layer0": 1, "layer1": 0}


def test_both_guards_together() -> None:
    """Layer a has two channels and must keep three; layer b has three and must keep them."""
    scores = {"a": torch.tensor([[1.0, 2], [3, 4]]), "b": torch.arange(9.0).view(3, 3) + 10}
    chosen = masks.keep(scores, 6, min_per_layer=3, per_channel=True)
    assert positions(chosen["a"]) == [1, 2, 3]
    assert positions(chosen["b"]) == [2, 5, 8]


def test_least_of_by_hand() -> None:
    scores = {"a": torch.zeros(4, 3), "b": torch.zeros(2, 1), "c": torch.zeros(1, 2, 3, 3)}
    assert masks.least_of(scores) == {"a": 1, "b": 1, "c": 1}
    assert masks.least_of(scores, 0) == {"a": 0, "b": 0, "c": 0}
    assert masks.least_of(scores, 3) == {"a": 3, "b": 2, "c": 3}
    assert masks.least_of(scores, 0, per_channel=True) == {"a": 4, "b": 2, "c": 1}
    assert masks.least_of(scores, 3, per_channel=True) == {"a": 4, "b": 2, "c": 3}


# Counts given


def test_keep_counts_keeps_the_best_of_every_layer() -> None:
    scores = scores_of(a=[1.0, 9.0, 9.0, 2.0], b=[5.0, 5.0, 5.0], c=[0.0, 1.0])
    chosen = masks.keep_counts(scores, {"a": 1, "b": 2, "c": 0})
    assert positions(chosen["a"]) == [1]
    assert positions(chosen["b"]) == [0, 1]
    assert positions(chosen["c"]) == []
    assert masks.keep_counts(scores, {"a": 4, "b": 3, "c": 2})["a"].all()


def test_keep_counts_within_and_per_channel() -> None:
    scores = {"a": torch.tensor([[9.0, 8, 7], [1, 2, 3], [6, 5, 4]])}
    before = scores["a"].clone()
    chosen = masks.keep_counts(scores, {"a": 4}, per_channel=True)["a"]
    assert chosen.int().tolist() == [[1, 1, 0], [0, 0, 1], [1, 0, 0]]
    within = {"a": torch.tensor([[0, 1, 1], [1, 1, 0], [0, 0, 0]]).bool()}
    chosen = masks.keep_counts(scores, {"a": 3}, per_channel=True, within=within)["a"]
    assert chosen.int().tolist() == [[0, 1, 1], [0, 1, 0], [0, 0, 0]]
    chosen = masks.keep_counts(scores, {"a": 2}, within=within)["a"]
    assert chosen.int().tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert torch.equal(scores["a"], before)


def test_scores_that_are_not_contiguous() -> None:
    scores = {"a": torch.rand(3, 7, generator=torch.Generator().manual_seed(0)).t()}
    assert not scores["a"].is_contiguous()
    same = {"a": scores["a"].contiguous()}
    for options in ({}, {"per_channel": True}, {"scope": "layer"}):
        found, expected = (masks.keep(each, 9, **options)["a"] for each in (scores, same))
        assert torch.equal(found, expected)
    found, expected = (masks.n_of_m(each, 1, 3)["a"] for each in (scores, same))
    assert torch.equal(found, expected)


# n of m


def n_of_m_by_hand(score: Tensor, n: int, m: int) -> Tensor:
    """Go through [out, in, *kernel] one group at a time."""
    out, inputs = score.shape[:2]
    flat = score.reshape(out, inputs, -1)
    mask = torch.zeros(flat.shape, dtype=torch.bool)
    for row in range(out):
        for place in range(flat.shape[2]):
            for start in range(0, inputs, m):
                group = sorted(range(start, start + m), key=lambda i: -flat[row, i, place].item())
                for i in group[:n]:
                    mask[row, i, place] = True
    return mask.view(score.shape)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (3, 8), (4, 4)])
@pytest.mark.parametrize("shape", [(5, 16), (3, 8, 3, 3), (4, 8, 1, 1), (2, 8, 5)])
@pytest.mark.parametrize("levels", [0, 3])
def test_n_of_m_keeps_the_best_of_every_group(
    shape: tuple[int, ...], n: int, m: int, levels: int
) -> None:
    scores = shaped_scores(shape, levels=levels)
    chosen = masks.n_of_m(scores, n, m)["layer0"]
    assert chosen.shape == shape and chosen.is_contiguous()
    assert torch.equal(chosen, n_of_m_by_hand(scores["layer0"], n, m))


def test_groups_lie_along_input_channels_at_the_same_kernel_position() -> None:
    """A 1x2 kernel over four channels; each place has its own two best."""
    score = torch.tensor([[1.0, 40], [2, 30], [3, 20], [4, 10]]).view(1, 4, 1, 2)
    chosen = masks.n_of_m({"a": score}, 2, 4)["a"]
    assert chosen.view(4, 2).int().tolist() == [[0, 1], [0, 1], [1, 0], [1, 0]]


def test_equal_scores_of_a_group_go_to_the_first() -> None:
    score = torch.tensor([[1.0, 1, 1, 1, 0, 2, 2, 2]])
    assert positions(masks.n_of_m({"a": score}, 2, 4)["a"]) == [0, 1, 5, 6]


def test_what_does_not_divide_stays_whole() -> None:
    """Depthwise layers have one input per group; the stem has three; 6 is no multiple of 4."""
    scores = shaped_scores((8, 1, 3, 3), (4, 3, 3, 3), (5, 6), (5, 8))
    found = {name: float(mask.float().mean()) for name, mask in masks.n_of_m(scores, 2, 4).items()}
    assert found == {"layer0": 1, "layer1": 1, "layer2": 1, "layer3": 0.5}


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (-1, 4), (2, 0)])
def test_bad_patterns(n: int, m: int) -> None:
    with pytest.raises(UsageError, match=f"{n}:{m}"):
        masks.n_of_m(shaped_scores((4, 8)), n, m)


def test_n_of_m_names_scores_that_are_not_finite() -> None:
    scores = {**shaped_scores((4, 8)), "bad": torch.full((4, 8), float("nan"))}
    with pytest.raises(UsageError, match="bad"):
        masks.n_of_m(scores, 2, 4)


# Allocation with a least of its own for every layer


@pytest.mark.parametrize(
    ("weights", "sizes", "kept", "least", "expected"),
    [
        pytest.param([1, 1], [20, 20], 10, [7, 1], [7, 3], id="one is raised"),
        pytest.param([1, 1], [20, 20], 10, [0, 0], [5, 5], id="nothing is raised"),
        pytest.param([1, 1, 1], [20, 20, 20], 12, [6, 0, 5], [6, 1, 5], id="two are raised"),
        pytest.param([9, 1], [4, 20], 12, [1, 6], [4, 8], id="one is full"),
        pytest.param([1, 1], [3, 20], 10, [9, 1], [3, 7], id="least is more than it has"),
        pytest.param([1, 3], [10, 10], 10, [5, 5], [5, 5], id="least is all"),
    ],
)
def test_allocations_with_a_least_per_layer(
    weights: list[float], sizes: list[int], kept: int, least: list[int], expected: list[int]
) -> None:
    names = "abc"[: len(sizes)]
    given = (dict(zip(names, each, strict=True)) for each in (weights, sizes))
    found = masks.allocate(*given, kept, dict(zip(names, least, strict=True)))
    assert found == dict(zip(names, expected, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_allocation_with_a_least_and_a_most_per_layer_is_water_filling(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(100):
        sizes = {name: draw.randint(1, 30) for name in "abcdef"[: draw.randint(1, 6)]}
        most = {name: draw.randint(0, size) for name, size in sizes.items()}
        least = {name: draw.randint(0, 12) for name in sizes}
        weights = {name: Fraction(draw.randint(1, 1000) ** 2, 10**6) for name in sizes}
        low = [min(least[name], most[name]) for name in sizes]
        high = list(most.values())
        kept = draw.randint(sum(low), sum(high))
        shares = [weights[name] * size for name, size in sizes.items()]
        found = masks.allocate(weights, sizes, kept, least, most=most)
        assert sum(found.values()) == kept
        level = water_level(shares, low, high, kept)
        for place, (name, share) in enumerate(zip(sizes, shares, strict=True)):
            assert low[place] <= found[name] <= high[place]
            if level is not None:
                ideal = min(max(level * share, low[place]), high[place])
                assert abs(found[name] - ideal) < 1


def test_too_little_for_the_least_of_every_layer() -> None:
    with pytest.raises(UsageError, match="10 weights cannot be split over 2 layers"):
        masks.allocate({"a": 1.0, "b": 1.0}, {"a": 9, "b": 9}, 10, {"a": 5, "b": 6})
