"""FORCE: by hand, and against pruning in rounds with masks and sorting; weights come back."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from autosparse import criteria
from autosparse.core.errors import UsageError
from autosparse.models.gradients import counting
from autosparse.sparsity import masks
from tests.criteria.plain import (
    chain,
    convnet,
    flat,
    gradient_by_loop,
    images,
    in_rounds,
    samples,
    squared_error,
)

force = criteria.get("force")
NAMES = ("0.weight", "4.weight")


def foresight(model, own):
    """Score by every weight's own value, and the gradient of the pruned network."""
    pairs = zip(own, gradient_by_loop(model, NAMES, images(5, 3, 4)), strict=True)
    return [(weight * gradient).abs() for weight, gradient in pairs]


def test_a_weight_comes_back_by_hand() -> None:
    # The case of test_iter_snip: one sample (1, 1), target (0, 0), errors 0.5 and 3.5, scores
    # (1.5, 1.25; 7, 5.25), and -2.5 falls in the first of two rounds (3 of 4 are kept, then 2).
    # Then the errors are 3 and 3.5 and the scores (9, 2.5 * 3 = 7.5; 7, 5.25): -2.5 comes back,
    # and the second row falls, the 5.25 below the 7.
    batch = samples(([1, 1], [0, 0]))
    model = chain([[3.0, -2.5], [2.0, 1.5]])
    scores = force(model, [batch], squared_error, sparsity=0.5, rounds=2)
    (kept, (third, fourth)) = scores["0.weight"].tolist()
    assert kept == [9.0, 7.5]
    assert -1 <= fourth < third < 0


@pytest.mark.parametrize(("sparsity", "rounds"), [(0.0, 2), (0.5, 1), (0.9, 5), (0.98, 12)])
def test_against_masks_and_sorting(sparsity: float, rounds: int) -> None:
    model = convnet()
    found = flat(force(model, images(5, 3, 4), cross_entropy, sparsity=sparsity, rounds=rounds))
    scores, kept = in_rounds(model.train(), NAMES, foresight, sparsity, rounds, may_return=True)
    assert torch.equal(found >= 0, kept[-1])
    alive = kept[-1]
    torch.testing.assert_close(found[alive], scores[-1][alive], rtol=1e-9, atol=1e-12)
    # The rest lies below zero in its order.
    order = found[~alive].argsort()
    assert (scores[-1][~alive][order].diff() > -1e-12).all()
    assert (found[~alive] >= -1).all()


def test_more_than_one_weight_comes_back_and_iter_snip_brings_none() -> None:
    model, data, options = convnet(), images(5, 3, 4), {"sparsity": 0.9, "rounds": 5}
    _, kept = in_rounds(model.train(), NAMES, foresight, **options, may_return=True)
    returned = kept[-1] & ~torch.stack(kept[:-1]).all(0)
    assert returned.sum() > 1
    assert (flat(force(model, data, cross_entropy, **options))[returned] >= 0).all()
    # The first round prunes alike, and for iter_snip that is for good.
    assert (
        flat(criteria.get("iter_snip")(model, data, cross_entropy, **options))[~kept[0]] == -5
    ).all()


def test_one_round_is_snip() -> None:
    data = images(5, 3, 4)
    snip = criteria.get("snip")(convnet(), data, cross_entropy)
    found = force(convnet(), data, cross_entropy, sparsity=0.7, rounds=1)
    once, chosen = masks.from_scores(snip, 0.7), masks.from_scores(found, 0.7)
    for name, mask in once.items():
        assert torch.equal(chosen[name], mask)
        torch.testing.assert_close(found[name][mask], snip[name][mask])


@pytest.mark.parametrize("sizes", [(5, 3), (1, 6, 1), (2, 2, 2, 2)])
def test_in_eval_mode_the_cut_into_batches_does_not_matter(sizes: tuple[int, ...]) -> None:
    options = {"sparsity": 0.8, "rounds": 4, "training_mode": False}
    whole = force(convnet(), images(8), cross_entropy, **options)
    parts = force(convnet(), images(*sizes), cross_entropy, **options)
    torch.testing.assert_close(flat(parts), flat(whole), rtol=1e-9, atol=1e-14)


def test_the_guard_keeps_a_layers_best() -> None:
    # As in test_iter_snip: scores up to 0.75 in the first layer, 37.5 and 18.75 in the second.
    weights = [[0.1] * 50] * 2, [[1.0, 0.5]]
    batch = samples(([1] * 50, [0]))
    options = {"sparsity": 100 / 102, "rounds": 1}
    free = force(chain(*weights), [batch], squared_error, min_per_layer=0, **options)
    held = force(chain(*weights), [batch], squared_error, **options)
    assert [(score >= 0).sum().item() for score in free.values()] == [0, 2]
    assert [(score >= 0).sum().item() for score in held.values()] == [1, 1]
    assert held["1.weight"][0, 0].item() == pytest.approx(37.5)


def test_cost() -> None:
    with counting() as cost:
        force(convnet(), images(5, 3, 4), cross_entropy, sparsity=0.9, rounds=7)
    assert cost.image_passes == 7 * 12


@pytest.mark.parametrize("rounds", [0, -1])
def test_it_needs_a_round(rounds: int) -> None:
    with pytest.raises(UsageError, match=f"rounds must be at least 1, got {rounds}"):
        force(convnet(), images(4), cross_entropy, sparsity=0.5, rounds=rounds)


def test_a_sparsity_out_of_range() -> None:
    with pytest.raises(UsageError, match="sparsity must be at least 0 and below 1"):
        force(convnet(), images(4), cross_entropy, sparsity=1.0, rounds=1)


def test_fewer_weights_than_layers() -> None:
    model = chain(*[torch.eye(10).add(0.1).tolist()] * 5)
    batch = samples(([1] * 10, [0] * 10))
    with pytest.raises(UsageError, match="3 weights are too few for 5 layers"):
        force(model, [batch], squared_error, sparsity=0.994, rounds=3)


def test_small_scores_keep_their_order_below_zero() -> None:
    # θ = 1, input x, target -1e-9 off the output: |θ * dL/dθ| = 1e-9 * x, rising along the layer.
    model = chain([[1.0] * 8]).float()
    inputs = torch.arange(1, 9).float()[None]
    scores = force(
        model,
        [(inputs, torch.zeros(1, dtype=torch.long))],
        lambda outputs, labels: 1e-9 * outputs.sum(),
        sparsity=0.5,
        rounds=1,
    )["0.weight"][0]
    assert (scores[4:] > 0).all()
    assert (scores[:4].diff() > 0).all()
