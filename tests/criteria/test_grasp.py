"""GraSP: by hand, against finite differences of the gradient, and its sign."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from autosparse import criteria
from autosparse.core.errors import UsageError
from autosparse.models.gradients import counting
from tests.criteria.plain import Batches, chain, convnet, flat, images, samples, squared_error

grasp = criteria.get("grasp")
NAMES = ("0.weight", "4.weight")


def gradient_of(model: nn.Module, batches: Batches, temperature: float) -> list[Tensor]:
    """Mean gradient by the prunable weights of the loss at outputs / temperature."""
    model = copy.deepcopy(model)
    total = sum(len(labels) for _, labels in batches)
    loss = sum(
        cross_entropy(model(pixels) / temperature, labels) * len(labels) / total
        for pixels, labels in batches
    )
    return list(torch.autograd.grad(loss, [model.get_parameter(name) for name in NAMES]))


def moved(model: nn.Module, direction: list[Tensor], by: float) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, way in zip(NAMES, direction, strict=True):
            model.get_parameter(name).add_(way, alpha=by)
    return model


def test_by_hand() -> None:
    # Output (4 * 1 - 1 * 2) / T = 1 at T = 2, target -1: error r = 2. g = r * x / T, H = x x' / T²,
    # so H g = x * |x|² * r / T³ = (1, 2) * 5 * 2 / 8 = (1.25, 2.5), times θ = (4, -1).
    batch = samples(([1, 2], [-1]))
    scores = grasp(chain([[4.0, -1.0]]), [batch], squared_error, temperature=2.0)
    assert scores["0.weight"].tolist() == [[5.0, -2.5]]


def test_two_batches_by_hand() -> None:
    # T = 1, θ = (1, 1). Sample (1, 0), target 0: g = (1, 0). Samples (0, 1) and (0, 2), target 0,
    # in the second batch: errors 1 and 2, g = (0, 1) and (0, 4). Means over three samples:
    # g = (1/3, 5/3), H = diag(1, 1 + 4) / 3; H g = (1/9, 25/9).
    data = [samples(([1, 0], [0])), samples(([0, 1], [0]), ([0, 2], [0]))]
    scores = grasp(chain([[1.0, 1.0]]), data, squared_error, temperature=1.0)
    assert scores["0.weight"].tolist() == [[pytest.approx(1 / 9), pytest.approx(25 / 9)]]


@pytest.mark.parametrize("training_mode", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_against_finite_differences(temperature: float, training_mode: bool) -> None:
    model, data = convnet(), images(5, 3)
    scores = grasp(model, data, cross_entropy, temperature=temperature, training_mode=training_mode)
    model.train(training_mode)
    g = gradient_of(model, data, temperature)
    step = 1e-4 / float(torch.cat([each.flatten() for each in g]).norm())
    above = gradient_of(moved(model, g, step), data, temperature)
    below = gradient_of(moved(model, g, -step), data, temperature)
    for name, up, down in zip(NAMES, above, below, strict=True):
        expected = model.get_parameter(name).detach() * (up - down) / (2 * step)
        scale = float(expected.abs().max())
        torch.testing.assert_close(scores[name], expected, rtol=1e-5, atol=1e-5 * scale)


def test_the_temperature_is_200() -> None:
    model, data = convnet(), images(5, 3)
    default = flat(grasp(model, data, cross_entropy))
    assert torch.equal(default, flat(grasp(model, data, cross_entropy, temperature=200.0)))
    assert not torch.equal(default, flat(grasp(model, data, cross_entropy, temperature=100.0)))


@pytest.mark.parametrize("lowest", [True, False])
def test_the_sign(lowest: bool) -> None:
    # Shrinking weights by ε moves θ by -εθ, and the squared norm of the gradient by
    # -2ε * (sum of θ * Hg): up for the lowest scores, which are pruned, down for the highest.
    model, data, shrink = convnet(), images(8), 1e-4
    scores = grasp(model, data, cross_entropy, temperature=1.0)
    ranked = flat(scores).argsort(descending=not lowest)[:40]
    chosen = torch.zeros(264, dtype=torch.bool).index_fill(0, ranked, True).split([72, 192])
    way = [
        -model.get_parameter(name).detach() * part.view_as(scores[name])
        for name, part in zip(NAMES, chosen, strict=True)
    ]
    model.train()
    before = sum(each.square().sum() for each in gradient_of(model, data, 1.0))
    after = sum(each.square().sum() for each in gradient_of(moved(model, way, shrink), data, 1.0))
    expected = -2 * shrink * flat(scores)[ranked].sum()
    assert (after > before) == lowest
    assert float(after - before) == pytest.approx(float(expected), rel=1e-2)


@pytest.mark.parametrize("sizes", [(5, 3), (1, 6, 1), (2, 2, 2, 2)])
def test_in_eval_mode_the_cut_into_batches_does_not_matter(sizes: tuple[int, ...]) -> None:
    whole = flat(grasp(convnet(), images(8), cross_entropy, training_mode=False))
    parts = flat(grasp(convnet(), images(*sizes), cross_entropy, training_mode=False))
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12 * float(whole.abs().max()))


def test_cost() -> None:
    # One pass for the gradient, two for the Hessian times it.
    with counting() as cost:
        grasp(convnet(), images(5, 3, 4), cross_entropy)
    assert cost.image_passes == 3 * 12


def test_a_temperature_of_zero() -> None:
    with pytest.raises(UsageError, match=r"grasp: the scores of .* are not finite"):
        grasp(convnet(), images(4), cross_entropy, temperature=0.0)
