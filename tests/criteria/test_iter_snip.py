"""Iterative SNIP: by hand, and against pruning in rounds with masks and sorting."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from autosparse import criteria
from autosparse.core.errors import UsageError
from autosparse.models.gradients import counting
from autosparse.sparsity import masks
from tests.criteria.plain import (
    chain,
    convnet,
    fallen_below_zero,
    flat,
    gradient_by_loop,
    images,
    in_rounds,
    samples,
    squared_error,
)

iter_snip = criteria.get("iter_snip")
NAMES = ("0.weight", "4.weight")


def saliency(model, own):
    weights = [model.get_parameter(name) for name in NAMES]
    pairs = zip(weights, gradient_by_loop(model, NAMES, images(5, 3, 4)), strict=True)
    return [(weight * gradient).abs() for weight, gradient in pairs]


def two_outputs() -> nn.Module:
    return chain([[3.0, -2.5], [2.0, 1.5]])


def test_by_hand() -> None:
    # One sample (1, 1) with target (0, 0): the errors are the outputs, 0.5 and 3.5, so
    # |θ * dL/dθ| = (1.5, 1.25; 7, 5.25). Half in two rounds keeps 3 of 4 (4 * 0.5^(1/2) = 2.83),
    # then 2. The 1.25 falls; then the first error is 3, so the 1.5 becomes 9 and the 5.25 falls.
    batch = samples(([1, 1], [0, 0]))
    scores = iter_snip(two_outputs(), [batch], squared_error, sparsity=0.5, rounds=2)
    assert scores["0.weight"].tolist() == [[9.0, -2.0], [7.0, -1.0]]


def test_one_round_is_snip() -> None:
    # From the case above: of 1.5, 1.25, 7 and 5.25 the two lowest fall at once.
    batch = samples(([1, 1], [0, 0]))
    scores = iter_snip(two_outputs(), [batch], squared_error, sparsity=0.5, rounds=1)
    assert scores["0.weight"].tolist() == [[-1.0, -1.0], [7.0, 5.25]]


@pytest.mark.parametrize(("sparsity", "rounds"), [(0.0, 2), (0.5, 1), (0.9, 5), (0.98, 12)])
def test_against_masks_and_sorting(sparsity: float, rounds: int) -> None:
    model = convnet()
    found = iter_snip(model, images(5, 3, 4), cross_entropy, sparsity=sparsity, rounds=rounds)
    scores, kept = in_rounds(model.train(), NAMES, saliency, sparsity, rounds)
    torch.testing.assert_close(flat(found), fallen_below_zero(scores, kept), rtol=1e-9, atol=1e-12)


def test_the_order_in_memory_does_not_matter() -> None:
    options = {"sparsity": 0.9, "rounds": 4}
    plain = iter_snip(convnet(), images(5, 3), cross_entropy, **options)
    model = convnet().to(memory_format=torch.channels_last)
    last = iter_snip(model, images(5, 3), cross_entropy, **options)
    for name, score in plain.items():
        torch.testing.assert_close(last[name], score, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sizes", [(5, 3), (1, 6, 1), (2, 2, 2, 2)])
def test_in_eval_mode_the_cut_into_batches_does_not_matter(sizes: tuple[int, ...]) -> None:
    options = {"sparsity": 0.8, "rounds": 4, "training_mode": False}
    whole = iter_snip(convnet(), images(8), cross_entropy, **options)
    parts = iter_snip(convnet(), images(*sizes), cross_entropy, **options)
    torch.testing.assert_close(flat(parts), flat(whole), rtol=1e-9, atol=1e-14)


def test_the_guard_keeps_a_layers_best() -> None:
    # 100 weights 0.1, then 1 and 0.5, input ones, target 0: both hidden units are 5, the error is
    # 5 + 2.5 = 7.5. Scores: 0.1 * 1 * 7.5 = 0.75 and 0.1 * 0.5 * 7.5 in the first layer, and
    # 5 * 1 * 7.5 = 37.5 and 18.75 in the second. 2 of 102 are kept.
    weights = [[0.1] * 50] * 2, [[1.0, 0.5]]
    batch = samples(([1] * 50, [0]))
    options = {"sparsity": 100 / 102, "rounds": 1}
    free = iter_snip(chain(*weights), [batch], squared_error, min_per_layer=0, **options)
    held = iter_snip(chain(*weights), [batch], squared_error, **options)
    assert [(score >= 0).sum().item() for score in free.values()] == [0, 2]
    assert [(score >= 0).sum().item() for score in held.values()] == [1, 1]
    assert held["1.weight"].tolist() == [[pytest.approx(37.5), -1.0]]


def test_the_masks_are_those_of_the_last_round() -> None:
    scores = iter_snip(convnet(), images(5, 3), cross_entropy, sparsity=0.9, rounds=6)
    chosen = masks.from_scores(scores, 0.9)
    assert masks.kept(chosen) == 26
    for name, mask in chosen.items():
        assert torch.equal(mask, scores[name] >= 0)


def test_cost() -> None:
    with counting() as cost:
        iter_snip(convnet(), images(5, 3, 4), cross_entropy, sparsity=0.9, rounds=7)
    assert cost.image_passes == 7 * 12


def test_cost_with_warm_up() -> None:
    with counting() as cost:
        iter_snip(convnet(), images(5, 3, 4), cross_entropy, sparsity=0.9, rounds=7, warm_up=True)
    assert cost.image_passes == pytest.approx(7 * 12 + 12 / 3)


@pytest.mark.parametrize("rounds", [0, -1])
def test_it_needs_a_round(rounds: int) -> None:
    with pytest.raises(UsageError, match=f"rounds must be at least 1, got {rounds}"):
        iter_snip(convnet(), images(4), cross_entropy, sparsity=0.5, rounds=rounds)


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1])
def test_a_sparsity_out_of_range(sparsity: float) -> None:
    with pytest.raises(UsageError, match="sparsity must be at least 0 and below 1"):
        iter_snip(convnet(), images(4), cross_entropy, sparsity=sparsity, rounds=1)


def test_a_missing_sparsity() -> None:
    with pytest.raises(UsageError, match="iter_snip needs the option sparsity"):
        iter_snip(convnet(), images(4), cross_entropy)


@pytest.mark.parametrize("layout", ["transposed", "with gaps"])
def test_a_weight_that_lies_otherwise_is_pruned_between_rounds(layout: str) -> None:
    # test_by_hand's case, the weight being the transpose, or a part, of a contiguous one.
    model = two_outputs()
    weight = model[0].weight.detach()
    if layout == "transposed":
        model[0].weight = nn.Parameter(weight.t().contiguous().t())
    else:
        model[0].weight = nn.Parameter(weight.repeat_interleave(2, 1)[:, ::2])
    assert not model[0].weight.is_contiguous()
    batch = samples(([1, 1], [0, 0]))
    scores = iter_snip(model, [batch], squared_error, sparsity=0.5, rounds=2)
    assert scores["0.weight"].tolist() == [[9.0, -2.0], [7.0, -1.0]]


def test_fewer_weights_than_layers() -> None:
    model = chain(*[torch.eye(10).add(0.1).tolist()] * 5)
    batch = samples(([1] * 10, [0] * 10))
    with pytest.raises(UsageError, match="3 weights are too few for 5 layers"):
        iter_snip(model, [batch], squared_error, sparsity=0.994, rounds=3)
