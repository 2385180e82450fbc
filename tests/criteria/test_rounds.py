"""Pruning in rounds: counts, and shrink against a plain implementation that sorts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from autosparse.core.errors import UsageError
from autosparse.criteria import rounds
from autosparse.criteria.rounds import STEP, Gradient, Take, counts, shrink
from tests.criteria.plain import densities, highest

Layers = list[Tensor]


# counts


@pytest.mark.parametrize(
    ("total", "sparsity", "number", "expected"),
    [
        (100, 0.75, 2, [50, 25]),
        (60, 0.875, 3, [30, 15, 7]),  # 52.5 would go; half a weight is removed
        (1000, 0.9, 3, [464, 215, 100]),  # 1000 * 10^(-1/3) = 464.2, 10^(-2/3): 215.4
        (10_000, 0.99, 4, [3162, 1000, 316, 100]),
        (7, 0.5, 1, [3]),
        (7, 0.0, 3, [7, 7, 7]),
    ],
)
def test_counts_by_hand(total: int, sparsity: float, number: int, expected: list[int]) -> None:
    assert list(counts(total, sparsity, number)) == expected


@pytest.mark.parametrize("number", [1, 2, 3, 7, 100])
def test_the_last_count_is_exact_and_they_fall(number: int) -> None:
    # Binary has 1 - 0.95 = 0.050000000000000044.
    found = list(counts(1000, 0.95, number))
    assert len(found) == number
    assert found[-1] == 50
    assert found == sorted(found, reverse=True)
    assert found[0] < 1000


@pytest.mark.parametrize("number", [0, -3])
def test_there_must_be_a_round(number: int) -> None:
    with pytest.raises(UsageError, match=f"rounds must be at least 1, got {number}"):
        list(counts(10, 0.5, number))


@pytest.mark.parametrize("sparsity", [1.0, -0.5])
def test_a_sparsity_out_of_range(sparsity: float) -> None:
    with pytest.raises(UsageError, match="sparsity must be at least 0 and below 1"):
        list(counts(10, sparsity, 1))


# shrink


def in_memory_order(tensor: Tensor, like: Tensor) -> Tensor:
    """Lay a tensor out as `like` lies in memory: channels last, if that does."""
    if like.ndim == 4 and not like.is_contiguous():
        return tensor.permute(0, 2, 3, 1).flatten()
    return tensor.flatten()


def naive(
    weights: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor | None]],
    sparsity: float,
    least: int = 1,
) -> tuple[Layers, Layers]:
    """`shrink` with a dense mask and a sort in every round; returns scores and masks.

    Both in the order in which the weights lie in memory.
    """
    sizes = [weight.numel() for weight in weights]
    start = [in_memory_order(weight, weight).clone() for weight in weights]
    alive = torch.ones(sum(sizes), dtype=torch.bool)
    fell = torch.zeros(sum(sizes))
    scores: Tensor = torch.zeros(())
    number_of = len(gradients)
    for number, count in enumerate(densities(len(alive), sparsity, number_of), start=1):
        layers = []
        for weight, like, gradient, part in zip(
            start, weights, gradients[number - 1], alive.split(sizes), strict=True
        ):
            g = torch.zeros(len(part)) if gradient is None else in_memory_order(gradient, like)
            layers.append((g * (weight * part)).abs())
        kept = highest(layers, count, alive, least)
        fell[alive & ~kept] = number - number_of - 1
        alive, scores = kept, torch.cat(layers)
    return (
        list(torch.where(alive, scores, fell.to(scores.dtype)).split(sizes)),
        list(alive.split(sizes)),
    )


def handing(gradients: Callable[[], Sequence[Tensor | None]]) -> Gradient:
    """Hand over one gradient after the other; None is left out."""

    def gradient(take: Take) -> None:
        for place, each in enumerate(gradients()):
            if each is not None:
                take(place, each)

    return gradient


def check(
    weights: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor | None]],
    sparsity: float,
    least: int = 1,
) -> dict[str, Tensor]:
    """Hold `shrink` to `naive`: scores, and what is zero in the weights afterwards."""
    named = {f"layer {place}": weight.clone() for place, weight in enumerate(weights)}
    rows = iter(gradients)

    def gradient() -> list[Tensor | None]:
        # They are used up.
        return [None if each is None else each.clone() for each in next(rows)]

    found = shrink(named, handing(gradient), sparsity, len(gradients), min_per_layer=least)
    assert next(rows, None) is None
    expected, alive = naive(weights, gradients, sparsity, least)
    assert list(found) == list(named)
    for like, score, wanted, part, after in zip(
        weights, found.values(), expected, alive, named.values(), strict=True
    ):
        assert score.shape == like.shape
        assert torch.equal(in_memory_order(score, like), wanted.to(score.dtype))
        before = in_memory_order(like, like)
        assert torch.equal(in_memory_order(after, like), torch.where(part, before, before * 0))
    return found


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


def mixture(seed: int = 0) -> Layers:
    """412 weights in layers of several kinds, one of them channels-last, one of one weight."""
    torch.manual_seed(seed)
    return [
        torch.randn(8, 3, 3, 3),
        channels_last(6, 4, 3, 2),
        torch.randn(5, 7),
        torch.randn(1, 1),
        torch.randn(4, 2, 2),
    ]


def drawn(weights: Layers, number: int) -> list[list[Tensor | None]]:
    return [[torch.randn(weight.shape) for weight in weights] for _ in range(number)]


@pytest.mark.parametrize("least", [0, 1, 3])
@pytest.mark.parametrize("number", [1, 2, 7])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.96])
def test_against_sorting(sparsity: float, number: int, least: int) -> None:
    weights = mixture()
    check(weights, drawn(weights, number), sparsity, least)


def test_gradients_may_lie_otherwise_than_weights() -> None:
    weights, gradients = mixture(), drawn(mixture(), 4)
    expected = check(weights, gradients, 0.8)
    for row in gradients:
        row[0] = row[0].to(memory_format=torch.channels_last)
        row[1] = row[1].to(memory_format=torch.channels_last)
        row[2] = row[2].t().contiguous().t()
    found = check(weights, gradients, 0.8)
    for name, score in expected.items():
        assert torch.equal(found[name], score)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_in_every_precision(dtype: torch.dtype) -> None:
    weights = [weight.to(dtype) for weight in mixture()]
    gradients = [[each.to(dtype) for each in row] for row in drawn(weights, 4)]
    found = check(weights, gradients, 0.8)
    assert {score.dtype for score in found.values()} == {dtype}


@pytest.mark.parametrize("least", [0, 2])
@pytest.mark.parametrize("number", [1, 5])
@pytest.mark.parametrize("seed", range(3))
def test_of_equal_ones_the_last_go(seed: int, number: int, least: int) -> None:
    torch.manual_seed(seed)
    weights = [torch.randint(1, 3, weight.shape).float() for weight in mixture()]
    weights[1] = weights[1].to(memory_format=torch.channels_last)
    gradients = [[torch.randint(0, 3, w.shape).float() for w in weights] for _ in range(number)]
    check(weights, gradients, 0.95, least)


def test_ties_by_hand() -> None:
    # All equal: 4 of 10 stay (10 * 0.2^(1/2) = 4.47), then 2.
    weights = {"a": torch.ones(4), "b": torch.ones(6)}
    found = shrink(weights, handing(lambda: [torch.ones(4), torch.ones(6)]), 0.8, 2)
    # The first four are layer a; the guard keeps the first of b instead of the last of them.
    assert found["a"].tolist() == [1, -1, -1, -2]
    assert found["b"].tolist() == [1, -2, -2, -2, -2, -2]
    assert weights["a"].tolist() == [1, 0, 0, 0]
    assert weights["b"].tolist() == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("least", [0, 1])
def test_a_layer_without_a_gradient(least: int) -> None:
    weights = mixture()
    gradients = drawn(weights, 4)
    for row in gradients:
        row[1] = row[3] = None
    found = check(weights, gradients, 0.6, least)
    # 248 of 412 go; the channels-last layer's 144 and the one weight score nothing, so they go
    # first but for what the guard keeps.
    assert (found["layer 1"] >= 0).sum() == least
    assert (found["layer 3"] >= 0).sum() == least


@pytest.mark.parametrize("least", [0, 1])
def test_dead_weights_are_never_preferred_to_living_ones(least: int) -> None:
    # In the second round nothing has a gradient: dead and living score zero alike, and the dead
    # lie first. 16 weights: 8, then 4 stay.
    weights = {"a": torch.ones(8), "b": torch.ones(8)}
    rows = iter([[torch.zeros(8), torch.arange(8) + 1.0], [None, torch.zeros(8)]])
    found = shrink(weights, handing(lambda: next(rows)), 0.75, 2, min_per_layer=least)
    if least:
        assert found["a"].tolist() == [0] + [-2] * 7
        assert found["b"].tolist() == [-2, 0, 0, 0, -1, -1, -1, -1]
    else:
        assert found["a"].tolist() == [-2] * 8
        assert found["b"].tolist() == [0, 0, 0, 0, -1, -1, -1, -1]


# Where a round tells nothing


def lasting(
    rows: list[list[Tensor | None]], sparsity: float, size: int = 4
) -> tuple[list[float], list[float]]:
    """Two layers of ones, each of which keeps its best weight."""
    weights, each = {name: torch.ones(size) for name in "ab"}, iter(rows)
    found = shrink(weights, handing(lambda: next(each)), sparsity, len(rows), lasting=True)
    return found["a"].tolist(), found["b"].tolist()


def test_where_nothing_has_a_gradient_the_last_scores_decide() -> None:
    # 8, then 4, then 2; the best of a stays all the time.
    first = [torch.tensor([1.0, 2, 3, 4]), torch.tensor([5.0, 8, 7, 6])]
    a, b = lasting([first, [None, torch.zeros(4)]], 0.75)
    assert a == [-2, -2, -2, 4]
    assert b == [-2, 8, -1, -1]


def test_a_layer_without_a_gradient_goes_by_its_last_scores_below_the_others() -> None:
    # 8, then 4, then 2; in the second round a is cut off: it keeps its best, and that is all.
    first = [torch.tensor([5.0, 6, 7, 8]), torch.tensor([1.0, 2, 3, 4])]
    a, b = lasting([first, [torch.zeros(4), torch.full((4,), 1e-30)]], 0.75)
    assert a[:3] == [-2, -1, -1]
    assert 0 < a[3] < 1e-30
    assert b == [-2, -2, -2, pytest.approx(4e-30 / 4)]


def test_the_last_scores_go_along_when_the_dead_are_left_behind() -> None:
    # 40 weights: 19, 9, 4, then 2 stay; with 9 of 40 most are dead.
    first = [torch.arange(20.0) + 1, torch.arange(20.0) + 21]
    a, b = lasting([first, [None, None], [None, None], [None, None]], 0.95, 20)
    assert a == [-4] * 19 + [20]
    assert b == [-4] * 2 + [-3] * 10 + [-2] * 5 + [-1] * 2 + [40]


def test_what_never_had_a_gradient_scores_zero() -> None:
    # 8, then 6 (8 * 0.5^(1/2) = 5.7), then 4.
    a, b = lasting([[None, torch.tensor([1.0, 2, 3, 4])] for _ in range(2)], 0.5)
    assert a == [0, -1, -2, -2]
    assert b == [-1, 2, 3, 4]


def test_a_shared_weight_has_what_any_of_its_uses_tells() -> None:
    weights = {"a": torch.ones(3)}

    def gradient(take: Take) -> None:
        for each in (torch.zeros(3), torch.tensor([1.0, 2, 3]), torch.zeros(3)):
            take(0, each)

    found = shrink(weights, gradient, 0.5, 1, lasting=True)
    assert found["a"].tolist() == [-1, -1, 3]  # Half a weight is removed.


def test_it_looks_at_the_weights_as_they_are_pruned() -> None:
    # The gradient is the number of those left: scores 4 * (1 … 4), then 2 * what is left.
    weights = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    found = shrink(
        weights, handing(lambda: [torch.full((4,), float((weights["a"] != 0).sum()))]), 0.75, 2
    )
    assert found["a"].tolist() == [-2.0, -2.0, -1.0, 8.0]


def test_the_guard_by_hand() -> None:
    weights = {"small": torch.tensor([0.1, 0.3, 0.2]), "large": torch.ones(5)}
    gradient = [torch.ones(3), torch.ones(5)]
    for least, small in [(0, [-1, -1, -1]), (1, [-1, 0.3, -1]), (2, [-1, 0.3, 0.2])]:
        mine = {name: each.clone() for name, each in weights.items()}
        found = shrink(
            mine, handing(lambda: [each.clone() for each in gradient]), 0.5, 1, min_per_layer=least
        )
        torch.testing.assert_close(found["small"], torch.tensor(small).float())
        assert (found["large"] > 0).sum() == 4 - least


def test_a_layer_smaller_than_the_guard_stays_whole() -> None:
    weights = [torch.tensor([[1e-3, 1e-4]]), torch.ones(50, 2)]
    found = check(weights, [[torch.ones(1, 2), torch.rand(50, 2)] for _ in range(3)], 0.9, 4)
    assert (found["layer 0"] > 0).all()


def test_bytes_may_stand_for_weights() -> None:
    weights = [torch.ones(weight.shape, dtype=torch.uint8) for weight in mixture()]
    weights[1] = weights[1].to(memory_format=torch.channels_last)
    found = check(weights, drawn(mixture(), 5), 0.9)
    assert all(score.is_floating_point() for score in found.values())


def test_bytes_without_a_gradient() -> None:
    # What fell has to lie below zero, which no byte does.
    weights = {"a": torch.ones(6, dtype=torch.uint8), "b": torch.ones(4, dtype=torch.uint8)}
    found = shrink(weights, handing(lambda: [None, torch.rand(4) + 1]), 0.5, 2)
    assert int((found["a"] >= 0).sum()) + int((found["b"] >= 0).sum()) == 5


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2), (2, 3, 4, 5)])
def test_weights_that_lie_otherwise_are_pruned(shape: tuple[int, ...]) -> None:
    weight = torch.rand(shape[::-1]).permute(*reversed(range(len(shape)))) + 0.1
    assert weight.shape == shape and not weight.is_contiguous()
    found = shrink({"a": weight}, handing(lambda: [torch.ones(shape)]), 0.5, 2)["a"]
    assert int((found > 0).sum()) == weight.numel() // 2
    assert torch.equal(weight == 0, found < 0)


def test_a_weight_with_gaps_in_memory_is_refused() -> None:
    whole = torch.arange(24.0).view(4, 6)
    with pytest.raises(UsageError, match="a lies in memory with gaps"):
        shrink({"a": whole[:, 1::2]}, handing(lambda: [torch.ones(4, 3)]), 0.5, 2)
    assert torch.equal(whole, torch.arange(24.0).view(4, 6))


@pytest.mark.parametrize("least", [0, 1, 2])
def test_many_rounds(least: int) -> None:
    # All but the last few die, layers are emptied (without a guard), and ties among zeros abound.
    weights, number = mixture(), 60
    gradients = drawn(weights, number)
    for place, row in enumerate(gradients):
        row[0] *= 1e-3
        if place % 3 == 2:
            row[2] = None
        if place % 10 == 9:
            row[1] = row[1].to(memory_format=torch.channels_last)
    found = check(weights, gradients, 0.97, least)
    assert min(float(score.min()) for score in found.values()) == -number
    if not least:
        assert any((score < 0).all() for score in found.values())


# Large ones, where a sample guesses the threshold


SIZES = (700_001, 300_003, 5)


@pytest.fixture
def guesses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The guesses that were made."""
    made: list[float] = []
    guess = rounds._Left._guess

    def remembered(self, share: float) -> float:
        made.append(guess(self, share))
        return made[-1]

    monkeypatch.setattr(rounds._Left, "_guess", remembered)
    return made


def large(scores: Tensor) -> Layers:
    return list(scores.split(list(SIZES)))


def ones() -> Layers:
    return large(torch.ones(sum(SIZES)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_ones_against_sorting(dtype: torch.dtype, guesses: list[float]) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(size).to(dtype) for size in SIZES]
    check(weights, [[torch.randn(size).to(dtype) for size in SIZES] for _ in range(2)], 0.9)
    # The guess is close: above the threshold, and not much.
    assert len(guesses) == 2
    torch.manual_seed(0)
    flat = torch.cat([torch.randn(size).to(dtype) for size in SIZES])
    flat = (flat * torch.cat([torch.randn(size).to(dtype) for size in SIZES])).abs()
    share = float((flat <= guesses[0]).double().mean())
    assert 1 - 0.1**0.5 < share < 1 - 0.1**0.5 + 0.15


def test_a_large_convolution_in_channels_last(guesses: list[float]) -> None:
    torch.manual_seed(0)
    weights = [channels_last(340, 330, 3, 3), torch.randn(10, 10)]
    check(weights, [[torch.randn(each.shape) for each in weights]], 0.9)
    assert guesses[0] < float("inf")


@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize(("seen", "too_low"), [(0.0, True), (5.0, False)])
def test_a_wrong_guess_changes_nothing(
    seen: float, too_low: bool, least: int, guesses: list[float]
) -> None:
    # All scores lie in [1, 2), but those that are sampled lie at `seen`.
    torch.manual_seed(0)
    scores = torch.rand(sum(SIZES)) + 1
    scores[::STEP] = torch.rand(len(scores[::STEP])) * 0.1 + seen
    check(ones(), [large(scores)], 0.5, least)
    below, removed = int((scores <= guesses[0]).sum()), sum(SIZES) // 2
    assert below < 2000 if too_low else below > 1.5 * removed


def test_large_ones_that_are_all_equal(guesses: list[float]) -> None:
    check(ones(), [ones()], 0.7)
    assert set(guesses) == {1.0}


def test_large_ones_without_sparsity(guesses: list[float]) -> None:
    torch.manual_seed(0)
    weights = ones()
    found = check(weights, [large(torch.rand(sum(SIZES)))], 0.0)
    assert all((score >= 0).all() for score in found.values())


def test_scores_beyond_float32(guesses: list[float]) -> None:
    torch.manual_seed(0)
    scores = torch.rand(sum(SIZES), dtype=torch.float64)
    weights = [each.double() for each in ones()]
    check(weights, [large(scores * 1e60)], 0.6)
    check(weights, [large(scores * 1e-60)], 0.6)


def test_what_is_no_number_stays_for_the_caller_to_see() -> None:
    gradient = torch.tensor([1, float("nan"), 3, float("nan"), float("nan")])
    found = shrink({"a": torch.ones(5)}, handing(lambda: [gradient.clone()]), 0.6, 2)["a"]
    assert found.isnan().any()


@pytest.mark.parametrize("first", [torch.float32, torch.float64])
def test_layers_of_unequal_width(first: torch.dtype) -> None:
    second = torch.float64 if first == torch.float32 else torch.float32
    weights = {"a": torch.ones(4, dtype=first), "b": torch.ones(4, dtype=second)}
    rows = [torch.tensor([1, 2, 7, 8.0], dtype=first), torch.tensor([3, 4, 5, 6.0], dtype=second)]
    found = shrink(weights, handing(lambda: [row.clone() for row in rows]), 0.5, 1)
    assert found["a"].tolist() == [-1, -1, 7, 8]
    assert found["b"].tolist() == [-1, -1, 5, 6]


def test_small_ones_are_all_looked_at(guesses: list[float]) -> None:
    shrink(
        {"a": torch.ones(1000 * STEP - 1)}, handing(lambda: [torch.ones(1000 * STEP - 1)]), 0.5, 1
    )
    assert guesses == [float("inf")]


@pytest.mark.parametrize("chance", [True, False])
def test_none_of_those_sampled_is_alive(chance: bool) -> None:
    torch.manual_seed(0)
    if chance:
        # The last of four rounds starts from 178 of a million.
        check(ones(), [large(torch.rand(sum(SIZES))) for _ in range(4)], 0.99999)
    else:
        scores = torch.rand(sum(SIZES)) + 1
        scores[::STEP] = 0
        check(ones(), [large(scores), large(scores)], 0.9)


def test_a_layer_that_is_always_short_costs_no_second_search_in_every_round(monkeypatch) -> None:
    """SynFlow on a ResNet: what the identities bypass is down to one weight after few rounds."""
    searches = []
    search = rounds._Left._lowest_of_all

    def counted(left: rounds._Left, excess: int) -> Tensor:
        searches.append(excess)
        return search(left, excess)

    monkeypatch.setattr(rounds._Left, "_lowest_of_all", counted)
    weights = {"poor": torch.full((40,), 1e-6), "rich": torch.rand(40) + 1}
    ones = [torch.ones(40), torch.ones(40)]

    def gradient(take: Take) -> None:
        for place, one in enumerate(ones):
            take(place, one.clone())

    scores = shrink(weights, gradient, 0.9, 20)
    assert int((scores["poor"] >= 0).sum()) == 1
    assert int((scores["rich"] >= 0).sum()) == 7
    assert len(searches) == 21, "one a round, and one when the layer became short"
