"""SynFlow: no layer is emptied, and float32 with rescaling is the plain sum in float64.

What it computes on small networks is tested in test_criteria.py.
"""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from autosparse import criteria, prune
from autosparse.core.errors import UsageError
from autosparse.criteria import synflow as module
from autosparse.criteria.scoring import Selection
from autosparse.models import zoo
from autosparse.models.config import ModelConfig
from autosparse.models.gradients import counting
from autosparse.sparsity import masks
from autosparse.sparsity.paths import rescale_between_blocks, without_shifts
from tests.conftest import few, make_model
from tests.criteria.plain import Batches, densities, fallen_below_zero, flat, highest

synflow = criteria.get("synflow")


def a_batch(*shape: int) -> Batches:
    """SynFlow looks at the shape only."""
    return [(torch.randn(1, *shape), torch.zeros(1, dtype=torch.long))]


def convolutions() -> nn.Module:
    """Four layers, 35,432 weights, with batch norm."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 64, 3, stride=2, bias=False),
        nn.ReLU(),
        nn.Conv2d(64, 44, 3, stride=2, bias=False),
        nn.BatchNorm2d(44),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(44, 10),
    )


def in_float64(
    model: nn.Module, shape: tuple[int, ...], sparsity: float, rounds: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Equation 4 and algorithm 1 with masks and sorting; scores and masks of every round."""
    names = list(zoo.prunable(model))
    network = copy.deepcopy(model).eval().double()
    for name, tensor in network.state_dict().items():
        if name.endswith((".bias", ".running_mean")):
            tensor.zero_()
        elif tensor.is_floating_point():
            tensor.abs_()
    weights = [network.get_parameter(name) for name in names]
    sizes = [weight.numel() for weight in weights]
    mask = torch.ones(sum(sizes), dtype=torch.bool)
    scores, kept = [], []
    for count in densities(len(mask), sparsity, rounds):
        total = network(torch.ones(1, *shape, dtype=torch.float64)).sum()
        gradients = torch.autograd.grad(total, weights, materialize_grads=True)
        layers = [(w * g).detach().abs() for w, g in zip(weights, gradients, strict=True)]
        mask = highest(layers, count, mask, least=1)
        with torch.no_grad():
            for weight, part in zip(weights, mask.split(sizes), strict=True):
                weight.mul_(part.view_as(weight))
        scores.append(torch.cat([layer.flatten() for layer in layers]))
        kept.append(mask)
    return scores, kept


def rescaled(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether the criterion may compute in float32."""
    copied = without_shifts(model, zoo.prunable(model))
    return rescale_between_blocks(copied, torch.ones(1, *shape)) is not None


def check(model: nn.Module, shape: tuple[int, ...], sparsity: float, rounds: int) -> None:
    """Hold the criterion to `in_float64`."""
    scores = synflow(model, a_batch(*shape), cross_entropy, sparsity=sparsity, rounds=rounds)
    close(flat(scores).double(), fallen_below_zero(*in_float64(model, shape, sparsity, rounds)))


def close(found: Tensor, expected: Tensor) -> None:
    """What falls when, and scores up to a common factor, are the same but for rounding in float32.

    Of positive numbers all summands are positive: no rounding error grows, each score is right to
    1e-4. Rounding may settle a near tie otherwise: one weight of 5000 may fall in another round.
    """
    differ = torch.where((found < 0) | (expected < 0), found != expected, False)
    assert differ.sum() <= len(found) / 5000
    assert (found >= 0).sum() == (expected >= 0).sum()
    alive = (found >= 0) & (expected >= 0)
    found, expected = found[alive], expected[alive]
    rtol = 1e-2 if differ.any() else 1e-4
    torch.testing.assert_close(found / found.sum(), expected / expected.sum(), rtol=rtol, atol=0)


# Layers


def test_synflow_at_999_permille_empties_no_layer_and_magnitude_does() -> None:
    model, selection = convolutions(), Selection(guard="none")
    by_flow = prune(model, a_batch(3, 16, 16), "synflow", 0.999, selection=selection)
    # Of 3 * 16 * 9 + 16 * 64 * 9 + 64 * 44 * 9 + 440 = 35,432 weights 35,397 go.
    assert by_flow.kept == 35
    assert masks.first_empty(by_flow.masks) is None
    assert by_flow.card["effective_density"] == pytest.approx(35 / 35432)
    by_size = prune(model, [], "magnitude", 0.999, selection=selection)
    assert by_size.kept == 35
    assert masks.first_empty(by_size.masks) is not None


def perceptron(*widths: int) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("widths", [(64, 100, 100, 10), (64, 100, 100, 100, 10)])
@pytest.mark.parametrize("guard", ["layer", "none"])
def test_a_round_that_would_empty_layers_ties_nothing(widths: tuple, guard: str) -> None:
    """In two rounds the first leaves a few weights; the wide layers have none among them."""
    model, count = perceptron(*widths), sum(a * b for a, b in pairwise(widths))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # It may be dead: one weight per layer.
        ticket = prune(
            model, a_batch(widths[0], 1, 1), "synflow", 0.999,
            selection=Selection(guard=guard), options={"rounds": 2},
        )  # fmt: skip
    assert ticket.kept == count - round(0.999 * count)
    assert "ties" not in ticket.card and "level" not in ticket.card
    scores = synflow(model, a_batch(widths[0], 1, 1), cross_entropy, sparsity=0.999, rounds=2)
    for name, score in scores.items():
        assert (score > 0).any(), name
        assert torch.equal(ticket.masks[name], score >= 0)
        assert len(score[score > 0].unique()) == (score > 0).sum()


def test_fewer_weights_than_layers() -> None:
    model = perceptron(4, 4, 4, 4)
    scores = synflow(model, a_batch(4, 1, 1), cross_entropy, sparsity=0.97, rounds=20)
    assert sum(int((score >= 0).sum()) for score in scores.values()) == 48 - 47


def test_a_softmax_whose_slope_overflows_is_told() -> None:
    """The sum over the paths is finite, the gradient is not: LeViT's is so."""

    class Slope(torch.autograd.Function):
        @staticmethod
        def forward(context, signal: Tensor) -> Tensor:
            return signal / 1e200 + 1  # No linear map, as a softmax is none.

        @staticmethod
        def backward(context, gradient: Tensor) -> Tensor:
            return gradient * 1e200 * 1e200

    class Steep(nn.Module):
        def forward(self, signal: Tensor) -> Tensor:
            return Slope.apply(signal)

    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), Steep(), nn.Linear(2, 2))
    with pytest.raises(UsageError, match=r"synflow has no scores .*gradient .* not finite.*snip"):
        prune(model, a_batch(2, 1, 1), "synflow", 0.5)


# Float32 with rescaling


@pytest.mark.parametrize(("sparsity", "rounds"), [(0.0, 1), (0.95, 4)])
def test_a_resnet_is_pruned_as_in_float64(sparsity: float, rounds: int) -> None:
    # At 64 px no weight sees padding only, so that none scores zero and there are no ties.
    model = make_model("test_resnet")
    assert rescaled(model, (1, 64, 64))
    check(model, (1, 64, 64), sparsity, rounds)


@pytest.mark.parametrize(("sparsity", "rounds"), [(0.5, 1), (0.95, 10)])
def test_convolutions_are_pruned_as_in_float64(sparsity: float, rounds: int) -> None:
    model = convolutions()
    with torch.no_grad():
        model[1].running_var.uniform_(0.5, 2)
        model[1].weight.uniform_(-2, 2)
        model[1].bias.normal_()
        model[1].running_mean.normal_()
    assert rescaled(model, (3, 12, 12))
    check(model, (3, 12, 12), sparsity, rounds)


def deep(seed: int = 0) -> nn.Module:
    """60 layers, of which each makes the signal about 13 times as large: 10^67 in the end."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for _ in range(60):
        layers += [nn.Linear(16, 16, bias=False), nn.ReLU()]
        nn.init.normal_(layers[-2].weight)
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize(("sparsity", "rounds"), [(0.0, 1), (0.5, 3), (0.7, 15)])
def test_sixty_layers_that_overflow_are_pruned_as_in_float64(sparsity: float, rounds: int) -> None:
    model = deep()
    plain = without_shifts(model, {})
    assert torch.isinf(plain(torch.ones(1, 16))).any()
    assert rescaled(model, (16,))
    check(model, (16,), sparsity, rounds)


def test_sixty_layers_that_underflow_are_pruned_as_in_float64() -> None:
    model = deep()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-3)
    assert not without_shifts(model, {})(torch.ones(1, 16)).any()
    assert rescaled(model, (16,))
    check(model, (16,), 0.7, 10)


def test_attention_is_computed_in_float64() -> None:
    model = make_model("test_vit")
    assert not rescaled(model, (1, 16, 16))
    check(model, (1, 16, 16), 0.9, 3)


def test_a_sigmoid_is_computed_in_float64() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Sigmoid(), nn.Linear(30, 30), nn.Linear(30, 3))
    assert not rescaled(model, (20,))
    check(model, (20,), 0.5, 4)


def test_what_overflows_and_is_not_linear_is_computed_in_float64() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Sigmoid(), deep())
    assert torch.isinf(without_shifts(model, {})(torch.ones(1, 16))).any()
    assert not rescaled(model, (16,))
    check(model, (16,), 0.5, 3)


def test_the_model_is_not_changed() -> None:
    for model, shape in [(make_model("test_resnet"), (1, 16, 16)), (deep(), (16,))]:
        model.train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        modules = [
            (name, type(each), len(each._forward_hooks)) for name, each in model.named_modules()
        ]
        synflow(model, a_batch(*shape), cross_entropy, sparsity=0.9, rounds=3)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
            assert tensor.is_contiguous()
        for (name, kind, hooks), (again, each) in zip(modules, model.named_modules(), strict=True):
            assert (name, kind, hooks) == (again, type(each), len(each._forward_hooks))
            assert each.training
        assert all(each.grad is None and each.requires_grad for each in model.parameters())


# Options and cost


def test_cost() -> None:
    with counting() as cost:
        synflow(convolutions(), a_batch(3, 16, 16), cross_entropy, sparsity=0.9, rounds=7)
    assert cost.image_passes == 7


def test_a_sparsity_out_of_range() -> None:
    with pytest.raises(UsageError, match="sparsity must be at least 0 and below 1"):
        synflow(deep(), a_batch(16), cross_entropy, sparsity=1.0)


# Known to fail


def test_volumes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    check(model, (1, 4, 4, 4), 0.5, 2)


def test_relu6_is_scored_as_relu() -> None:
    model = convolutions()
    with torch.no_grad():
        for place in (0, 3, 5):
            model[place].weight.mul_(10)
    options = {"sparsity": 0.0, "rounds": 1}
    expected = flat(synflow(model, a_batch(3, 16, 16), cross_entropy, **options))
    for place in (2, 4, 7):
        model[place] = nn.ReLU6()
    found = flat(synflow(model, a_batch(3, 16, 16), cross_entropy, **options))
    assert (expected > 0).all()
    assert (found > 0).all()
    torch.testing.assert_close(found / found.sum(), expected / expected.sum(), rtol=1e-4, atol=0)


def test_a_shared_relu6_is_scored_as_relu_wherever_it_is_held() -> None:
    found = []
    for clipped in (nn.ReLU6(), nn.ReLU()):
        model = convolutions()
        with torch.no_grad():
            for place in (0, 3, 5):
                model[place].weight.mul_(10)
        for place in (2, 4, 7):
            model[place] = clipped
        options = {"sparsity": 0.0, "rounds": 1}
        scores = flat(synflow(model, a_batch(3, 16, 16), cross_entropy, **options))
        found.append(scores / scores.sum())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=0, check_dtype=False)


def test_a_relu6_inside_a_norm_is_scored_as_relu() -> None:
    """As timm's MobileNetV2 has them. What is clipped at six has no gradient."""
    options = {"sparsity": 0.0, "rounds": 1}
    found = []
    for clipped in (nn.ReLU, nn.ReLU6):
        model = convolutions()
        with torch.no_grad():
            model[3].weight.mul_(100)
        model[1] = BatchNormAct2d(16, act_layer=clipped)
        model[6] = BatchNormAct2d(44, act_layer=clipped)
        found.append(flat(synflow(model, a_batch(3, 16, 16), cross_entropy, **options)))
    assert (found[0] > 0).all()
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    "name",
    few(
        ["test_byobnet", "test_vit", "test_convnext", "test_mambaout"], ["test_byobnet", "test_vit"]
    ),
)
def test_leaving_out_dead_channels_changes_nothing(name: str, monkeypatch) -> None:
    """Down to 2 % in 30 rounds, so that channels are left out three times."""
    config, narrowed = ModelConfig(name), []
    model = zoo.create(config, num_classes=10, in_chans=1, image_size=32, seed=0)
    narrow = module._Channels.narrow

    def noted(channels: module._Channels, *found: list[Tensor]) -> tuple[list, list]:
        weights, spots = narrow(channels, *found)
        narrowed.append(sum(weight.numel() for weight in weights))
        return weights, spots

    monkeypatch.setattr(module._Channels, "narrow", noted)
    arguments = (model, a_batch(1, 32, 32), cross_entropy)
    scores = synflow(*arguments, sparsity=0.98, rounds=30)
    whole = sum(weight.numel() for weight in zoo.prunable(model).values())
    assert narrowed == sorted(narrowed, reverse=True)
    assert len(narrowed) == 4
    assert narrowed[-1] < 0.6 * whole
    monkeypatch.setattr(module, "_maps_channels", lambda layer: False)
    expected = synflow(*arguments, sparsity=0.98, rounds=30)
    assert narrowed[4:] == [whole] * 4
    close(flat(scores).double(), flat(expected).double())


def test_half_precision_is_scored_in_float32() -> None:
    model = convolutions().bfloat16()
    options = {"sparsity": 0.9, "rounds": 3}
    found = synflow(model, a_batch(3, 16, 16), cross_entropy, **options)
    expected = synflow(copy.deepcopy(model).float(), a_batch(3, 16, 16), cross_entropy, **options)
    assert all(torch.equal(score, expected[name]) for name, score in found.items())
    assert {score.dtype for score in found.values()} == {torch.float32}
