"""NTK-SAP: the gradient by the mask by hand and by finite differences; what scores depend on."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from autosparse import criteria
from autosparse.core.errors import UsageError
from autosparse.criteria.ntk_sap import mask_gradients
from autosparse.models.gradients import counting
from tests.criteria.plain import chain, convnet, flat, images

ntk_sap = criteria.get("ntk_sap")
Weights = dict[str, Tensor]


def leaf(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, requires_grad=True)


def gathered(model: nn.Module, here: Weights, there: Weights, inputs: Tensor) -> list[Tensor]:
    """Both parts of the gradients, added up."""
    sums = {place: torch.zeros_like(each) for place, each in enumerate(here.values())}
    mask_gradients(model, here, there, inputs, lambda place, part: sums[place].add_(part))
    return list(sums.values())


def test_mask_gradients_by_hand() -> None:
    # f = m1 w1 x1 + m2 w2 x2; the difference is -m1 x1 + 2 m2 x2.
    # x = (1, 2): difference 3, gradient 2 * 3 * (-1, 4) = (-6, 24).
    # x = (0, 1): difference 2, gradient 2 * 2 * (0, 2) = (0, 8). Mean (-3, 16).
    here, there = {"0.weight": leaf([[2, 1]])}, {"0.weight": leaf([[3, -1]])}
    inputs = torch.tensor([[1.0, 2.0], [0.0, 1.0]]).double()
    (found,) = gathered(chain([[0.0, 0.0]]), here, there, inputs)
    assert found.tolist() == [[-3.0, 16.0]]


def drawn(model: nn.Module, names: tuple[str, ...]) -> tuple[Weights, Weights, Weights]:
    """Masks of zeros and ones, weights, and weights a little way off."""
    torch.manual_seed(3)
    shapes = {name: model.get_parameter(name) for name in names}
    mask = {name: (torch.rand_like(each) < 0.7).double() for name, each in shapes.items()}
    here = {name: torch.randn_like(each.detach()) for name, each in shapes.items()}
    there = {name: each + 0.3 * torch.randn_like(each) for name, each in here.items()}
    return mask, here, there


def by_finite_differences(
    distance: Callable[[Weights], Tensor], mask: Weights, step: float = 1e-5
) -> list[Tensor]:
    found = []
    for name, each in mask.items():
        slopes = torch.zeros_like(each)
        for place in each.nonzero().tolist():
            sides = []
            for sign in (1, -1):
                changed = {**mask, name: each.clone()}
                changed[name][tuple(place)] += sign * step
                sides.append(distance(changed))
            slopes[tuple(place)] = (sides[0] - sides[1]) / (2 * step)
        found.append(slopes)
    return found


def under(mask: Weights, weights: Weights) -> Weights:
    return {name: (mask[name] * weights[name]).requires_grad_() for name in mask}


def deep_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)
    ).double()


def test_mask_gradients_against_finite_differences() -> None:
    model, names = deep_net(), ("0.weight", "2.weight", "4.weight")
    mask, here, there = drawn(model, names)
    inputs = torch.randn(5, 3).double()

    @torch.no_grad()
    def distance(at: Weights) -> Tensor:
        first = functional_call(model, under(at, here), (inputs,))
        second = functional_call(model, under(at, there), (inputs,))
        return (first - second).square().sum(1).mean()

    found = gathered(model, under(mask, here), under(mask, there), inputs)
    for ours, expected in zip(found, by_finite_differences(distance, mask), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)
        assert expected.abs().max() > 0.01


def test_batch_norm_takes_the_statistics_of_the_unperturbed_network() -> None:
    model, names = convnet(), ("0.weight", "4.weight")
    mask, here, there = drawn(model, names)
    inputs = images(6)[0][0]
    found = gathered(model, under(mask, here), under(mask, there), inputs)
    # The same by hand: statistics of the first network's convolution, fixed, for both.
    fixed = copy.deepcopy(convnet()).eval()
    with torch.no_grad():
        features = nn.functional.conv2d(inputs, mask["0.weight"] * here["0.weight"], model[0].bias)
    fixed[1].running_mean.copy_(features.mean((0, 2, 3)))
    fixed[1].running_var.copy_(features.var((0, 2, 3)))

    @torch.no_grad()
    def distance(at: Weights) -> Tensor:
        first = functional_call(fixed, under(at, here), (inputs,))
        second = functional_call(fixed, under(at, there), (inputs,))
        return (first - second).square().sum(1).mean()

    for ours, expected in zip(found, by_finite_differences(distance, mask), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


def linear_net() -> nn.Module:
    return chain([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])


def data(*sizes: int, inputs: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.randn(size, inputs).double(), torch.zeros(size, dtype=torch.long)) for size in sizes
    ]


def test_the_expected_score_of_a_linear_layer() -> None:
    # The difference is -Δx with Δ of variance ε² and x of variance 1, so that by the mask it is
    # 2 Δi xi (sum of Δj xj), 2 ε² in the mean.
    scores = ntk_sap(
        linear_net(), data(8), cross_entropy, sparsity=0.0, rounds=1, draws=1500, epsilon=0.02
    )
    expected = torch.full((2, 3), 2 * 0.02**2).double()
    torch.testing.assert_close(scores["0.weight"], expected, rtol=0.25, atol=0)
    assert abs(scores["0.weight"].mean() / expected[0, 0] - 1) < 0.1


def test_the_perturbation_is_epsilon() -> None:
    options = {"sparsity": 0.0, "rounds": 1, "draws": 2}
    small, large = (
        ntk_sap(linear_net(), data(8), cross_entropy, epsilon=epsilon, **options)["0.weight"]
        for epsilon in (0.01, 0.03)
    )
    torch.testing.assert_close(large, 9 * small, rtol=1e-6, atol=0)


def test_neither_weights_nor_pixels_matter_but_biases_do() -> None:
    options = {"sparsity": 0.5, "rounds": 3, "draws": 2}
    first = flat(ntk_sap(deep_net(), data(4, 2), cross_entropy, **options))
    other = deep_net()
    with torch.no_grad():
        for place in (0, 2, 4):
            other[place].weight.normal_()
    again = [(pixels.square() + 1, labels) for pixels, labels in data(4, 2)]
    assert torch.equal(first, flat(ntk_sap(other, again, cross_entropy, **options)))
    with torch.no_grad():
        other[0].bias.add_(1)
    assert not torch.equal(first, flat(ntk_sap(other, again, cross_entropy, **options)))


def test_weights_are_drawn_with_kaimings_deviation() -> None:
    # One hidden unit, f = m2 v m1 w x; with Δ small the derivative by m1 and by m2 is
    # 2 d², d = (w δv + v δw) x. E d² = ε² (var w + var v) = ε² (2/fan_in + 2/fan_in), both 2.
    model = chain([[1.0]], [[1.0]])
    found = ntk_sap(
        model, data(4, inputs=1), cross_entropy,
        sparsity=0.0, rounds=1, draws=3000, epsilon=1e-4,
    )  # fmt: skip
    for score in found.values():
        assert float(score) / (2 * 1e-8 * (2 + 2)) == pytest.approx(1, rel=0.15)


def test_every_round_looks_at_the_network_as_it_is_pruned() -> None:
    # Four inputs, one output: from the third round on one weight is left, and then the score is
    # 2 Δ² x² of that weight alone; nothing comes from weights that are gone.
    model = chain([[1.0, 2.0, 3.0, 4.0]])
    options = {"sparsity": 0.75, "rounds": 4, "draws": 3}
    score = ntk_sap(model, data(8, inputs=4), cross_entropy, **options)["0.weight"].flatten()
    # 4 * 0.25^(k/4): 2.8, 2, 1.4, 1.
    assert sorted(score[score < 0].tolist()) == [-4.0, -3.0, -2.0]
    torch.manual_seed(0)
    for _ in range(4):
        total = 0.0
        for _ in range(3):
            nn.init.kaiming_normal_(torch.empty(1, 4, dtype=torch.float64))
            delta = 0.01 * torch.randn(1, 4, dtype=torch.float64).flatten()
            pixels = torch.randn(8, 4, dtype=torch.float64)
            total += 2 * (delta**2 * pixels**2).mean(0) / 3
    kept = int(score.argmax())
    assert score[kept] == pytest.approx(float(total[kept]), rel=1e-9)


def test_the_seed_draws() -> None:
    first, other = (
        flat(ntk_sap(deep_net(), data(4), cross_entropy, sparsity=0.0, rounds=1, seed=seed))
        for seed in (0, 1)
    )
    assert not torch.allclose(first, other)


def test_cost() -> None:
    # Two forward and two backward passes, and a forward pass for the statistics.
    with counting() as cost:
        ntk_sap(deep_net(), data(5, 3), cross_entropy, sparsity=0.5, rounds=4, draws=3)
    assert cost.image_passes == pytest.approx(4 * 3 * 8 * (2 + 1 / 3))


@pytest.mark.parametrize("option", [{"rounds": 0}, {"draws": 0}, {"sparsity": 1.0}])
def test_bad_options(option: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        ntk_sap(deep_net(), data(4), cross_entropy, **{"sparsity": 0.5, "rounds": 1, **option})


def test_no_draw_is_named() -> None:
    with pytest.raises(UsageError, match="draws"):
        ntk_sap(deep_net(), data(4), cross_entropy, sparsity=0.5, rounds=1, draws=0)
