"""ProsPr: by hand, and against finite differences through the steps."""

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

prospr = criteria.get("prospr")


@pytest.mark.parametrize(("second_order", "expected"), [(True, 4.0), (False, 16.0)])
def test_by_hand(second_order: bool, expected: float) -> None:
    # L = w²/2. From 8 two steps at a rate of 0.5 lead to 4 and 2, where dL/dw = 2; and
    # dw2/dw0 = 0.5². Second order: 8 * 2 * 0.25 = 4; first: 8 * 2 = 16.
    scores = prospr(
        chain([[8.0]]),
        [samples(([1], [0]))],
        squared_error,
        steps=2,
        learning_rate=0.5,
        second_order=second_order,
    )
    assert scores["0.weight"].item() == expected


def test_which_batch_is_taken_by_hand() -> None:
    # The step takes the first batch: L = w²/2, w = 8 - 0.1 * 8 = 7.2. The loss is the second's,
    # (2w)²/2: 4 * 7.2 = 28.8, through the step 0.9 * 28.8 = 25.92, times 8: 207.36.
    data = [samples(([1], [0])), samples(([2], [0]))]
    scores = prospr(chain([[8.0]]), data, squared_error, steps=1)
    assert scores["0.weight"].item() == pytest.approx(207.36)


def loss_after(
    model: nn.Module, batches: Batches, steps: int, rate: float, seed: int = 0
) -> tuple[Tensor, nn.Module]:
    """Take plain steps; return the loss on the batch after, and the network."""
    model = copy.deepcopy(model)
    for number in range(steps + 1):
        torch.manual_seed(seed + number)
        pixels, labels = batches[number % len(batches)]
        loss = cross_entropy(model(pixels), labels)
        if number == steps:
            break
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= rate * parameter.grad
    return loss, model


def slope(model: nn.Module, name: str, place: int, step: float = 1e-5, **how) -> float:
    """dL(θ_k) / dc of one weight, θ_0 = c * θ."""
    sides = []
    for c in (1 + step, 1 - step):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.get_parameter(name).view(-1)[place] *= c
        sides.append(loss_after(changed, **how)[0].item())
    return (sides[0] - sides[1]) / (2 * step)


def smooth_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def data(*sizes: int) -> Batches:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, 3, generator=generator).double(),
            torch.randint(0, 2, (size,), generator=generator),
        )
        for size in sizes
    ]


@pytest.mark.parametrize(("steps", "batches"), [(1, 1), (3, 2), (4, 7)])
def test_against_finite_differences(steps: int, batches: int) -> None:
    model, given = smooth_net(), data(*[4, 3, 5, 2, 4, 3, 3][:batches])
    scores = prospr(model, given, cross_entropy, steps=steps, learning_rate=0.5)
    how = {"batches": given, "steps": steps, "rate": 0.5}
    for name in ("0.weight", "2.weight"):
        for place, score in enumerate(scores[name].flatten().tolist()):
            expected = abs(slope(model, name, place, **how))
            assert score == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_the_biases_are_trained_too() -> None:
    # Were they not, the meta-gradient would be another.
    model, given = smooth_net(), data(4)
    scores = flat(prospr(model, given, cross_entropy, steps=3, learning_rate=0.5))
    for place in (0, 2):
        model[place].register_buffer("bias", model[place]._parameters.pop("bias").detach())
    frozen = flat(prospr(model, given, cross_entropy, steps=3, learning_rate=0.5))
    assert (scores / frozen - 1).abs().max() > 0.01


def test_through_batch_norm_and_dropout() -> None:
    # Every visit of a step draws the same dropout, seed + number of the step.
    model = convnet()
    model[2] = nn.Sequential(nn.Tanh(), nn.Dropout(0.3))
    given = images(4, 5)
    scores = prospr(model, given, cross_entropy, steps=2, seed=5)
    how = {"batches": given, "steps": 2, "rate": 0.1, "seed": 5}
    for name in ("0.weight", "4.weight"):
        for place in range(0, scores[name].numel(), 19):
            expected = abs(slope(model.train(), name, place, **how))
            found = float(scores[name].flatten()[place])
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("steps", [1, 3])
def test_first_order(steps: int) -> None:
    model, given = convnet(), images(4, 5)
    scores = prospr(model, given, cross_entropy, steps=steps, learning_rate=0.5, second_order=False)
    loss, after = loss_after(model.train(), given, steps, 0.5)
    after.zero_grad()
    loss = cross_entropy(after(given[steps % 2][0]), given[steps % 2][1])
    loss.backward()
    for name in ("0.weight", "4.weight"):
        expected = (model.get_parameter(name) * after.get_parameter(name).grad).abs().detach()
        torch.testing.assert_close(scores[name], expected, rtol=1e-9, atol=1e-12)


def test_no_step_is_snip_on_the_first_batch() -> None:
    given = images(4, 5)
    none = prospr(convnet(), given, cross_entropy, steps=0)
    snip = criteria.get("snip")(convnet(), given[:1], cross_entropy)
    torch.testing.assert_close(flat(none), flat(snip))


def test_the_defaults_are_three_steps_at_a_tenth() -> None:
    model, given = smooth_net(), data(4, 3)
    default = flat(prospr(model, given, cross_entropy))
    spelt = flat(prospr(model, given, cross_entropy, steps=3, learning_rate=0.1))
    assert torch.equal(default, spelt)


def test_cost() -> None:
    # Batches of 4, 5, 4, 5 images. Forward: steps 0 to 2 and the loss at the end, 4 + 5 + 4 + 5.
    # Backward through step 2: steps 0 and 1 again, then 2 passes of step 2: 9 + 8; through step 1:
    # 4 + 10; through step 0: 8.
    with counting() as cost:
        prospr(convnet(), images(4, 5), cross_entropy, steps=3)
    assert cost.image_passes == 18 + 17 + 14 + 8


def test_cost_of_the_first_order() -> None:
    with counting() as cost:
        prospr(convnet(), images(4, 5), cross_entropy, steps=3, second_order=False)
    assert cost.image_passes == 18


def test_steps_that_blow_up() -> None:
    with pytest.raises(UsageError, match=r"prospr: the scores of .* are not finite"):
        prospr(chain([[8.0]]), [samples(([1e9], [0]))], squared_error, steps=30)


def test_a_negative_number_of_steps() -> None:
    with pytest.raises(UsageError, match="steps"):
        prospr(convnet(), images(4), cross_entropy, steps=-1)
