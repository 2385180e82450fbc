"""Convolutions that standardise their weight: the kernel that is applied is zero where pruned.

The kernel is found out by sending one-hot images through the layer.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import conv2d, cross_entropy, pad

from autosparse import criteria
from autosparse.models import zoo
from autosparse.models.standardised import (
    STANDARDISED,
    as_plain,
    kernels_gated,
    kernels_masked,
    mask_kernel,
)
from autosparse.sparsity import masks
from autosparse.sparsity.compact import densify
from autosparse.sparsity.ticket import Ticket, compact
from autosparse.training import steppers
from autosparse.training.config import TrainingConfig
from tests.conftest import make_model

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 8


@dataclass(frozen=True)
class Case:
    """One layer: 4 input channels, 6 output channels."""

    kind: type[nn.Conv2d]
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    options: tuple[tuple[str, Any], ...] = ()

    def build(self) -> nn.Conv2d:
        torch.manual_seed(0)
        layer = self.kind(
            4, 6, self.kernel, stride=self.stride, dilation=self.dilation, groups=self.groups,
            **{"bias": True, **dict(self.options)},
        ).double()  # fmt: skip
        with torch.no_grad():
            layer.weight.add_(0.3)  # a mean that is not zero, so that standardising shows
            if hasattr(layer, "gain"):
                layer.gain.uniform_(0.5, 2)
        return layer


CASES = {
    "scaled": Case(ScaledStdConv2d),
    "scaled, gamma and eps": Case(ScaledStdConv2d, options=(("gamma", 1.7), ("eps", 0.01))),
    "scaled, groups": Case(ScaledStdConv2d, groups=2, stride=2),
    "scaled, 1x1": Case(ScaledStdConv2d, kernel=(1, 1)),
    "scaled same": Case(ScaledStdConv2dSame, stride=2),
    "scaled same, dilated": Case(ScaledStdConv2dSame, dilation=2),
    "standard": Case(StdConv2d, stride=2),
    "standard, eps": Case(StdConv2d, options=(("eps", 0.01),)),
    "standard same": Case(StdConv2dSame, stride=2),
    "standard same, 5x3": Case(StdConv2dSame, kernel=(5, 3), groups=2),
    "standard, no bias": Case(StdConv2d, options=(("bias", False),)),
}
ALL = pytest.mark.parametrize("name", CASES)


class Only(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images)


def chosen_for(layer: nn.Conv2d, density: float = 0.5) -> Tensor:
    """Return a mask with a whole filter, a filter of one survivor, and the rest at random."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(layer.weight.shape, generator=generator) < density
    mask[0] = True
    mask[1] = False
    mask[1, 1, 0, 0] = True
    assert 0 < int(mask[2:].sum()) < mask[2:].numel()
    return mask


def compacted(case: Case) -> tuple[Only, Tensor, Tensor]:
    """Return the compact model, its mask, and the weight before."""
    model = Only(case.build())
    weight = model.layer.weight.detach().clone()
    mask = chosen_for(model.layer)
    compact(model, Ticket.from_model(model, {"layer.weight": mask}, {}))
    return model, mask, weight


def standardised(layer: nn.Conv2d, weight: Tensor) -> Tensor:
    """Return (θ - mean) / sqrt(var + eps) * gain * gamma / sqrt(fan-in), filter by filter."""
    rows = []
    fan_in = weight[0].numel()
    for number, each in enumerate(weight):
        mean = each.sum() / fan_in
        variance = ((each - mean) ** 2).sum() / fan_in
        row = (each - mean) / (variance + layer.eps) ** 0.5
        if isinstance(layer, ScaledStdConv2d | ScaledStdConv2dSame):
            row = row * layer.gain[number] * layer.scale
        rows.append(row)
    return torch.stack(rows)


def padded(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """Pad as timm's layers do: by `padding`, or at most one more at the far end (SAME)."""
    sides = []
    for axis in (1, 0):
        before = after = layer.padding[axis]
        if getattr(layer, "same_pad", False):
            length = images.shape[2 + axis]
            windows = -(-length // layer.stride[axis])
            reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
            missing = max((windows - 1) * layer.stride[axis] + reach - length, 0)
            before, after = missing // 2, missing - missing // 2
        sides += [before, after]
    return pad(images, sides)


def by_hand(layer: nn.Conv2d, kernel: Tensor, images: Tensor) -> Tensor:
    return conv2d(
        padded(layer, images), kernel, layer.bias, layer.stride, 0, layer.dilation, layer.groups
    )


def kernel_applied(layer: nn.Conv2d) -> Tensor:
    """Find the kernel out: for every place of it one image that is 1 at the pixel it lies on."""
    row = column = 2  # a window that lies whole inside, at stride 1 and 2
    found = torch.zeros(layer.weight.shape, dtype=torch.float64)
    corner = padded(layer, torch.zeros(1, 1, SIDE, SIDE).double())
    top = (corner.shape[2] - SIDE) // 2  # what SAME pads more lies at the far end
    left = (corner.shape[3] - SIDE) // 2
    per_group, outputs = found.shape[1], layer.out_channels // layer.groups
    with torch.no_grad():
        background = layer(torch.zeros(1, 4, SIDE, SIDE).double())
        for channel, y, x in product(range(4), *map(range, layer.kernel_size)):
            image = torch.zeros(1, 4, SIDE, SIDE).double()
            at = (
                row * layer.stride[0] - top + y * layer.dilation[0],
                column * layer.stride[1] - left + x * layer.dilation[1],
            )
            assert min(at) >= 0
            image[0, channel, at[0], at[1]] = 1
            response = (layer(image) - background)[0, :, row, column]
            group = channel // per_group
            mine = slice(group * outputs, (group + 1) * outputs)
            found[mine, channel % per_group, y, x] = response[mine]
            others = torch.ones(len(response), dtype=torch.bool)
            others[mine] = False
            assert not response[others].any()
    return found


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(5)).double()


# The kernel


@ALL
def test_probing_finds_timms_own_kernel(name: str) -> None:
    layer = CASES[name].build()
    kernel = standardised(layer, layer.weight).detach()
    torch.testing.assert_close(kernel_applied(layer), kernel, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer(images()), by_hand(layer, kernel, images()))


@ALL
def test_a_mask_on_the_weight_alone_would_not_do(name: str) -> None:
    """What this is for: timm's layer applies other numbers where the weight is zero."""
    case = CASES[name]
    layer, mask = case.build(), chosen_for(case.build())
    with torch.no_grad():
        layer.weight.mul_(mask)
    assert kernel_applied(layer)[~mask].abs().max() > 0.01


@ALL
def test_the_kernel_is_exactly_zero_where_pruned(name: str) -> None:
    model, mask, _ = compacted(CASES[name])
    with torch.no_grad():
        if model.layer.bias is not None:
            model.layer.bias.zero_()
    kernel = kernel_applied(model.layer)
    assert torch.equal(kernel != 0, mask)


@ALL
def test_the_kernel_is_mask_times_standardised_masked_weight(name: str) -> None:
    model, mask, weight = compacted(CASES[name])
    expected = mask * standardised(model.layer, mask * weight).detach()
    torch.testing.assert_close(kernel_applied(model.layer), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model(images()), by_hand(model.layer, expected, images()))


@ALL
def test_a_filter_without_survivors_gives_its_bias(name: str) -> None:
    case = CASES[name]
    model = Only(case.build())
    mask = chosen_for(model.layer)
    mask[2] = False
    compact(model, Ticket.from_model(model, {"layer.weight": mask}, {}))
    outputs = model(images())
    bias = 0.0 if model.layer.bias is None else model.layer.bias[2].item()
    assert (outputs[:, 2] == bias).all()
    assert outputs.isfinite().all()


@ALL
def test_a_gate_multiplies_the_kernel_too(name: str) -> None:
    model = Only(CASES[name].build())
    gate = torch.rand(model.layer.weight.shape, generator=torch.Generator().manual_seed(3)).double()
    before = model(images())
    expected = gate * standardised(model.layer, gate * model.layer.weight).detach()
    with kernels_masked(model):
        held = set(vars(model.layer))
        weights = {"layer.weight": gate * model.layer.weight.detach()}
        with kernels_gated(model, {"layer.weight": gate, "other.weight": gate}):
            found = functional_call(model, weights, (images(),))
        assert set(vars(model.layer)) == held
    torch.testing.assert_close(found, by_hand(model.layer, expected, images()))
    assert torch.equal(model(images()), before)


# Gradients


@ALL
def test_gradients_are_those_of_masked_dense(name: str) -> None:
    model, mask, weight = compacted(CASES[name])
    inputs = images().requires_grad_()
    model(inputs).square().sum().backward()

    twin = CASES[name].build()
    dense = weight.clone().requires_grad_()
    same = images().requires_grad_()
    by_hand(twin, mask * standardised(twin, mask * dense), same).square().sum().backward()

    slot = model.layer.parametrizations.weight.original
    assert slot.shape == slot.grad.shape == (int(mask.sum()),)
    torch.testing.assert_close(slot.grad, dense.grad[mask])
    assert dense.grad[mask].abs().max() > 1e-3
    assert not dense.grad[~mask].any()
    torch.testing.assert_close(inputs.grad, same.grad)
    for attribute in ("bias", "gain"):
        if getattr(twin, attribute, None) is not None:
            found, expected = (getattr(each, attribute).grad for each in (model.layer, twin))
            torch.testing.assert_close(found, expected)


# Densify, copies, files


@ALL
def test_densify_keeps_outputs_and_kernel(name: str) -> None:
    model, mask, weight = compacted(CASES[name])
    expected = model(images())
    densify(model)
    assert isinstance(model.layer.weight, nn.Parameter)
    assert torch.equal(model.layer.weight, weight * mask)
    torch.testing.assert_close(model(images()), expected)
    assert torch.equal(kernel_applied(model.layer)[~mask], torch.zeros(int((~mask).sum())).double())


def test_a_densified_layer_goes_on_masking_when_a_survivor_becomes_zero() -> None:
    """The mask is what was pruned, not what happens to be zero."""
    model, mask, _ = compacted(CASES["scaled"])
    densify(model)
    with torch.no_grad():
        model.layer.weight[0, 0, 0, 0] = 0
    expected = mask * standardised(model.layer, model.layer.weight).detach()
    assert expected[0, 0, 0, 0].abs() > 0.01
    torch.testing.assert_close(kernel_applied(model.layer), expected)


@ALL
def test_an_unpruned_layer_is_unchanged(name: str) -> None:
    model = Only(CASES[name].build())
    expected = model(images())
    whole = {"layer.weight": torch.ones(model.layer.weight.shape).bool()}
    compact(model, Ticket.from_model(model, whole, {}))
    assert type(model.layer) is type(CASES[name].build())
    assert isinstance(model.layer.weight, nn.Parameter)
    assert torch.equal(model(images()), expected)
    mask_kernel(model.layer)
    torch.testing.assert_close(model(images()), expected)


def test_other_modules_are_left_alone() -> None:
    layer = nn.Conv2d(2, 2, 1)
    mask_kernel(layer)
    assert "forward" not in vars(layer)


@ALL
def test_a_deep_copy_is_equal_and_independent(name: str) -> None:
    model, _, _ = compacted(CASES[name])
    expected = model(images())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(-2)
    assert torch.equal(model(images()), expected)
    assert not torch.equal(twin(images()), expected)


def test_a_deep_copy_of_a_densified_layer_is_equal_and_independent() -> None:
    model = densify(compacted(CASES["scaled"])[0])
    expected = model(images())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), expected)
    with torch.no_grad():
        twin.layer.weight.normal_()
    assert torch.equal(model(images()), expected)
    assert not torch.equal(twin(images()), expected)


@pytest.mark.parametrize("layer", [CASES["scaled"].build, lambda: nn.Conv2d(4, 6, 3).double()])
def test_densifying_a_copy_leaves_the_original_as_it_was(layer: Callable[[], nn.Conv2d]) -> None:
    model = Only(layer())
    chosen = {"layer.weight": chosen_for(model.layer)}
    compact(model, Ticket.from_model(model, chosen, {}))
    expected = model(images())
    densify(copy.deepcopy(model))
    assert torch.equal(model(images()), expected)


@ALL
def test_state_dict_round_trip(name: str) -> None:
    model, _, _ = compacted(CASES[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    other, _, _ = compacted(CASES[name])
    assert not torch.equal(other(images()), model(images()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images()), model(images()))
    names = {key.removeprefix("layer.") for key in model.state_dict()}
    known = {f"parametrizations.weight.{each}" for each in ("original", "0.fingerprint")}
    assert names <= known | {"bias", "gain"}


@ALL
def test_a_ticket_file_gives_the_same_kernel(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = Only(case.build())
    mask = chosen_for(model.layer)
    ticket = Ticket.from_model(model, {"layer.weight": mask}, {})
    ticket.save(tmp_path / "ticket.safetensors")
    compact(model, ticket)
    other = Only(case.build())
    with torch.no_grad():
        other.layer.weight.normal_()
    compact(other, Ticket.load(tmp_path / "ticket.safetensors"))
    assert torch.equal(kernel_applied(other.layer), kernel_applied(model.layer))
    assert torch.equal(other(images()), model(images()))


def test_a_second_ticket_replaces_the_first() -> None:
    model, mask, weight = compacted(CASES["scaled"])
    densify(model)
    with torch.no_grad():
        model.layer.weight.copy_(weight)
    other = mask.clone()
    other[3] = ~other[3]
    compact(model, Ticket.from_model(model, {"layer.weight": other}, {}))
    expected = other * standardised(model.layer, other * weight).detach()
    torch.testing.assert_close(kernel_applied(model.layer), expected)
    densify(model)
    torch.testing.assert_close(kernel_applied(model.layer), expected)


def test_a_second_ticket_may_keep_a_layer_whole() -> None:
    model, _, weight = compacted(CASES["scaled"])
    densify(model)
    with torch.no_grad():
        model.layer.weight.copy_(weight)
    whole = torch.ones(weight.shape, dtype=torch.bool)
    compact(model, Ticket.from_model(model, {"layer.weight": whole}, {}))
    torch.testing.assert_close(
        kernel_applied(model.layer), standardised(model.layer, weight).detach()
    )


def test_a_densified_model_is_pickled_whole() -> None:
    model, _, _ = compacted(CASES["scaled"])
    densify(model)
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    again = torch.load(whole, weights_only=False)
    torch.testing.assert_close(again(images()), model(images()))


# Inside criteria


@ALL
def test_inside_kernels_masked_zeros_stay_zeros(name: str) -> None:
    case = CASES[name]
    model = Only(case.build())
    mask = chosen_for(model.layer)
    with torch.no_grad():
        model.layer.weight.mul_(mask)
    before = model(images())
    expected = mask * standardised(model.layer, model.layer.weight).detach()
    with kernels_masked(model):
        torch.testing.assert_close(kernel_applied(model.layer), expected, rtol=1e-9, atol=1e-9)
    assert type(model.layer) is type(case.build())
    assert torch.equal(model(images()), before)


def test_kernels_masked_leaves_a_pruned_layer_pruned() -> None:
    model, _, _ = compacted(CASES["scaled"])
    before = model(images())
    with kernels_masked(model):
        assert torch.equal(model(images()), before)
    assert torch.equal(model(images()), before)
    assert "Masked" in type(model.layer).__mro__[1].__name__


def test_kernels_masked_ends_after_an_error_too() -> None:
    model = Only(CASES["scaled"].build())
    with pytest.raises(ZeroDivisionError), kernels_masked(model):
        raise ZeroDivisionError
    assert type(model.layer) is type(CASES["scaled"].build())


@ALL
def test_as_plain_applies_the_weight_as_it_is(name: str) -> None:
    model = as_plain(Only(CASES[name].build()))
    kernel = model.layer.weight.detach()
    torch.testing.assert_close(kernel_applied(model.layer), kernel)


def test_snip_sees_the_standardised_kernel() -> None:
    """|θ * dL/dθ| through the standardisation, written by hand."""
    torch.manual_seed(0)
    layer = CASES["scaled"].build()
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(6 * SIDE * SIDE, 3).double())
    labels = torch.tensor([0, 1, 2])
    scores = criteria.get("snip")(model, [(images(), labels)], cross_entropy)
    weight = layer.weight.detach().clone().requires_grad_()
    hidden = by_hand(layer, standardised(layer, weight), images()).relu().flatten(1)
    gradient = torch.autograd.grad(cross_entropy(model[3](hidden), labels), weight)[0]
    torch.testing.assert_close(scores["0.weight"], (weight * gradient).abs().detach())


# timm's NFNet


def nfnet() -> tuple[nn.Module, Ticket]:
    model = make_model("test_nfnet")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, STANDARDISED):
                module.gain.fill_(1)  # timm starts the last of a branch at zero
    weights = zoo.prunable(model)
    scores = {key: torch.rand(each.shape, generator=generator) for key, each in weights.items()}
    return model, Ticket.from_model(model, masks.from_scores(scores, 0.8), {})


def digits_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    pixels = torch.randn(20, 1, 16, 16, generator=generator, dtype=torch.float64)
    return pixels, torch.arange(20) % 10


def by_hand_inside(model: nn.Module, chosen: dict[str, Tensor]) -> None:
    """Make every standardising layer of a dense model compute the formula above."""
    for name, module in model.named_modules():
        if isinstance(module, STANDARDISED):
            mask = chosen[f"{name}.weight"]

            def forward(inputs: Tensor, module=module, mask=mask) -> Tensor:
                kernel = mask * standardised(module, mask * module.weight)
                return by_hand(module, kernel, inputs)

            module.forward = forward


def test_a_training_step_of_an_nfnet_is_the_masked_dense_one() -> None:
    model, ticket = nfnet()
    dense = copy.deepcopy(model).double().train()
    by_hand_inside(dense, ticket.masks)
    with torch.no_grad():
        for name, mask in ticket.masks.items():
            dense.get_parameter(name).mul_(mask)
    compact(model, ticket).double().train()
    pixels, labels = digits_batch()
    rate = 0.1
    config = TrainingConfig(optimizer="sgd", learning_rate=rate, weight_decay=0.0, schedule="none")
    stepper = steppers.PlainStepper(model, config, 1)
    losses = [stepper.step(pixels, labels).item() for _ in range(2)]

    expected = []
    velocity: dict[str, Tensor] = {}
    for _ in range(2):
        loss = cross_entropy(dense(pixels), labels)
        expected.append(loss.item())
        dense.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, parameter in dense.named_parameters():
                gradient = parameter.grad * ticket.masks.get(name, torch.ones(()))
                velocity[name] = 0.9 * velocity.get(name, torch.zeros(())) + gradient
                step = gradient + 0.9 * velocity[name]  # Nesterov, timm's sgd
                parameter.sub_(rate * step)
    # The loss is a float32 of float32 outputs: some ten roundings by 6e-8.
    assert losses == pytest.approx(expected, rel=1e-6)
    assert losses[1] != pytest.approx(losses[0], rel=1e-3)
    densify(model)
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)


def test_a_trained_nfnet_ticket_gives_the_trained_outputs(tmp_path: Path) -> None:
    model, ticket = nfnet()
    compact(model, ticket).train()
    pixels, labels = digits_batch()
    stepper = steppers.PlainStepper(model, TrainingConfig(schedule="none"), 1)
    stepper.step(pixels.float(), labels)
    model.eval()
    expected = model(pixels.float())
    Ticket.from_compact(model, ticket, {}).save(tmp_path / "trained.safetensors")
    again = make_model("test_nfnet", seed=1).eval()
    compact(again, Ticket.load(tmp_path / "trained.safetensors"))
    assert torch.equal(again(pixels.float()), expected)


def test_no_pruned_weight_of_an_nfnet_is_applied() -> None:
    """Every pruned weight may take any value in the dense formula: the output stays."""
    model, ticket = nfnet()
    dense = copy.deepcopy(model).eval()
    by_hand_inside(dense, ticket.masks)
    with torch.no_grad():
        for name, mask in ticket.masks.items():
            module = dense.get_submodule(name.removesuffix(".weight"))
            if not isinstance(module, STANDARDISED):
                module.weight.mul_(mask)
    compact(model, ticket).eval()
    pixels = digits_batch()[0]
    found, expected = model.double()(pixels), dense.double()(pixels)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
