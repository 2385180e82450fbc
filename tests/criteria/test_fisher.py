"""Empirical Fisher: by hand, and against a loop over samples."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from autosparse import criteria
from autosparse.core.errors import UsageError
from autosparse.models.gradients import counting
from tests.criteria.plain import chain, convnet, flat, images, samples, squared_error

fisher = criteria.get("fisher")
NAMES = ("0.weight", "4.weight")


@pytest.mark.parametrize(
    ("first_order", "expected"), [(True, [[6.0, 2.75]]), (False, [[5.0, 4.25]])]
)
def test_by_hand(first_order: bool, expected: list[list[float]]) -> None:
    # θ = (2, -1). Sample (1, 1), target 0: error 1, gradient (1, 1). Sample (1, 2), target 2:
    # error -2, gradient (-2, -4). Means: g = (-0.5, -1.5), F = (5/2, 17/2).
    # F θ² / 2 = (5, 4.25); g θ = (-1, 1.5); their differences are 6 and 2.75.
    batch = samples(([1, 1], [0]), ([1, 2], [2]))
    model = chain([[2.0, -1.0]])
    scores = fisher(model, [batch], squared_error, first_order=first_order)
    assert scores["0.weight"].tolist() == expected


def test_the_change_can_be_negative() -> None:
    # θ = 1, sample 1 with target 0: g = F = 1, and F/2 - g = -1/2: the loss falls from 1/2 to 0
    # when the weight goes. The score is its size.
    scores = fisher(chain([[1.0]]), [samples(([1], [0]))], squared_error)
    assert scores["0.weight"].tolist() == [[0.5]]


def by_loop(first_order: bool) -> torch.Tensor:
    model, total = convnet().eval(), 0
    sums = [torch.zeros_like(model.get_parameter(name)) for name in NAMES]
    squares = copy.deepcopy(sums)
    for pixels, labels in images(5, 3, 4):
        for number in range(len(labels)):
            model.zero_grad()
            cross_entropy(model(pixels[number][None]), labels[number][None]).backward()
            for place, name in enumerate(NAMES):
                gradient = model.get_parameter(name).grad
                sums[place] += gradient
                squares[place] += gradient**2
            total += 1
    result = []
    for name, g, f in zip(NAMES, sums, squares, strict=True):
        delta = -model.get_parameter(name).detach()
        change = f / total * delta**2 / 2 + (g / total * delta if first_order else 0)
        result.append(change.abs().flatten())
    return torch.cat(result)


@pytest.mark.parametrize("training_mode", [True, False])
@pytest.mark.parametrize("first_order", [True, False])
def test_against_a_loop_over_samples(first_order: bool, training_mode: bool) -> None:
    # Batch norm is in eval mode whatever mode is asked for.
    scores = fisher(
        convnet(),
        images(5, 3, 4),
        cross_entropy,
        first_order=first_order,
        training_mode=training_mode,
    )
    torch.testing.assert_close(flat(scores), by_loop(first_order), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("sizes", [(5, 3), (1, 6, 1), (2, 2, 2, 2)])
def test_the_cut_into_batches_does_not_matter(sizes: tuple[int, ...]) -> None:
    whole = fisher(convnet(), images(8), cross_entropy, training_mode=False)
    parts = fisher(convnet(), images(*sizes), cross_entropy, training_mode=False)
    torch.testing.assert_close(flat(parts), flat(whole), rtol=1e-9, atol=1e-14)


def test_warm_up_sets_the_statistics_that_are_used() -> None:
    model, data = convnet(), images(8)
    warm = flat(fisher(model, data, cross_entropy, warm_up=True))
    with torch.no_grad():
        features = model[0](data[0][0])
        model[1].running_mean.copy_(features.mean((0, 2, 3)))
        model[1].running_var.copy_(features.var((0, 2, 3)))
    torch.testing.assert_close(warm, flat(fisher(model, data, cross_entropy)))
    assert not torch.allclose(warm, flat(fisher(convnet(), data, cross_entropy)))


@pytest.mark.parametrize("first_order", [True, False])
def test_cost(first_order: bool) -> None:
    with counting() as cost:
        fisher(convnet(), images(5, 3, 4), cross_entropy, first_order=first_order)
    assert cost.image_passes == 12


def test_it_needs_data() -> None:
    with pytest.raises(UsageError, match="fisher needs data"):
        fisher(convnet(), [], cross_entropy)
