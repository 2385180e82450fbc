"""The network as a sum over paths; rescaling."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from torch import Tensor, nn

from autosparse.core.errors import UsageError
from autosparse.models import zoo
from autosparse.sparsity import paths
from tests.conftest import make_model
from tests.sparsity.test_reach import Named, Waits, chain

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_batches_say_the_shape() -> None:
    model = make_model()
    assert paths.image_shape(model, [(torch.zeros(5, 3, 7, 9), torch.zeros(5))]) == (3, 7, 9)


def test_else_what_the_model_was_made_for_says_the_shape() -> None:
    assert paths.image_shape(make_model()) == (1, 16, 16)
    assert paths.image_shape(timm.create_model("test_resnet")) == (3, 160, 160)


def test_else_it_is_not_known() -> None:
    with pytest.raises(UsageError, match="give a batch"):
        paths.image_shape(chain(2, 2))


# Without shifts


def test_without_shifts_is_a_positive_copy_in_eval_mode() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    with torch.no_grad():
        model[1].running_mean.fill_(3)
        model[1].weight.fill_(-2)
    before = copy.deepcopy(model.state_dict())
    copied = paths.without_shifts(model.train(), {"0.weight": model[0].weight})
    assert all(torch.equal(model.state_dict()[key], each) for key, each in before.items())
    assert model.training and not any(module.training for module in copied.modules())
    assert torch.equal(copied[0].weight, model[0].weight.abs())
    assert torch.equal(copied[1].weight, torch.full((2,), 2.0))
    for name in ("0.bias", "1.bias", "1.running_mean", "3.bias"):
        assert not copied.state_dict()[name].any(), name
    needed = [name for name, each in copied.named_parameters() if each.requires_grad]
    assert needed == ["0.weight"]


# Only paths


def test_only_paths_leaves_a_linear_map() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.GELU(), nn.Dropout(0.5),
        nn.MaxPool2d(2), nn.Conv2d(4, 3, 1, bias=False), nn.GroupNorm(1, 3), nn.LeakyReLU(),
        nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 5, bias=False), nn.Tanh(),
    ).eval()  # fmt: skip
    gates = paths.only_paths(model)
    assert list(gates) == ["2", "7", "11"]
    generator = torch.Generator().manual_seed(1)
    one, other = torch.randn(2, 1, 2, 6, 6, generator=generator)
    torch.testing.assert_close(model(2 * one - 3 * other), 2 * model(one) - 3 * model(other))
    assert model(one).abs().min() > 0


def test_the_activation_inside_a_norm_has_a_gate_of_its_name() -> None:
    model = timm.create_model("test_efficientnet", num_classes=2)
    expected = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ReLU | nn.SiLU) and not isinstance(module, nn.Identity)
    ]
    assert expected
    gates = paths.only_paths(model)
    assert set(gates) == set(expected)
    assert any(name.endswith(".act") for name in gates)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_what_lets_through_a_part_stays() -> None:
    model = nn.Sequential(nn.Sigmoid(), nn.Hardsigmoid(), nn.Softmax(dim=1), nn.Hardswish())
    assert list(paths.only_paths(model)) == ["3"]
    kinds = [type(module) for module in model]
    assert kinds == [nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, paths.Gate]


def test_a_head_with_a_norm_in_its_name_is_no_norm() -> None:
    model = timm.create_model("test_convnext", num_classes=3)
    paths.only_paths(model)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert isinstance(model.head.fc, nn.Linear)
    assert isinstance(model.head.norm, nn.Identity)


def test_patterns_make_the_linear_map_the_network() -> None:
    """A network of ReLUs is linear where the same units are open."""
    model = Named(
        lambda net, x: net.c(net.act2(net.b(net.act1(net.a(x))))),
        a=nn.Linear(4, 6, bias=False), act1=nn.ReLU(), b=nn.Linear(6, 5, bias=False),
        act2=nn.ReLU(), c=nn.Linear(5, 2, bias=False),
    )  # fmt: skip
    images = torch.randn(7, 4, generator=torch.Generator().manual_seed(2))
    linear = copy.deepcopy(model)
    gates = paths.only_paths(linear)
    assert not torch.allclose(linear(images), model(images))
    patterns = paths.activation_patterns(model, gates, lambda: model(images))
    for name, gate in gates.items():
        gate.patterns = patterns[name]
    torch.testing.assert_close(linear(images), model(images))
    assert not any(module._forward_pre_hooks for module in model.modules())


class Shares(nn.Module):
    """Two sequences that share one activation, which the first holds twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        act = nn.ReLU()
        self.first = nn.Sequential(nn.Linear(4, 6), act, nn.Linear(6, 5), act)
        self.second = nn.Sequential(nn.Linear(5, 5), act, nn.Linear(5, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.first(inputs))


def test_an_activation_that_is_held_at_several_places_has_one_gate() -> None:
    model = Shares()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    images = torch.randn(7, 4, generator=torch.Generator().manual_seed(2))
    linear = copy.deepcopy(model)
    gates = paths.only_paths(linear)
    assert list(gates) == ["first.1"]
    assert not any(isinstance(module, nn.ReLU) for module in linear.modules())
    gates["first.1"].patterns = paths.activation_patterns(model, gates, lambda: model(images))[
        "first.1"
    ]
    torch.testing.assert_close(linear(images), model(images))


def test_an_activation_that_is_used_twice_has_two_patterns() -> None:
    model = Named(
        lambda net, x: net.act(net.b(net.act(net.a(x)))),
        a=nn.Linear(4, 6), act=nn.ReLU(), b=nn.Linear(6, 5),
    )  # fmt: skip
    images = torch.randn(7, 4)
    found = paths.activation_patterns(model, ["act"], lambda: model(images))["act"]
    first = model.a(images) > 0
    assert torch.equal(found[0], first)
    assert torch.equal(found[1], model.b(model.a(images).relu()) > 0)
    gate = paths.Gate()
    gate.patterns = [*found]
    assert torch.equal(gate(torch.ones(7, 6)), first.float())
    assert torch.equal(gate(torch.ones(7, 5)), found[1].float())


# Rescaling between blocks


def positive(model: nn.Module) -> nn.Module:
    return paths.without_shifts(model, zoo.prunable(model))


def conv_chain(depth: int = 4, width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        for _ in range(depth)
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


def test_a_chain_is_rescaled_by_a_power_of_two() -> None:
    model, images = positive(conv_chain()), torch.ones(1, 8, 6, 6)
    with torch.no_grad():
        expected = model(images)
        rescaling = paths.rescale_between_blocks(model, images)
        assert rescaling is not None
        for pixels in (images, 3 * images):
            rescaling.log2 = 0
            found = model(pixels)
            assert rescaling.log2 != 0
            scale = float(pixels[0, 0, 0, 0])
            # Four layers of sums of 72 positive float32 numbers: 4 * 72 * 2^-24.
            torch.testing.assert_close(
                found * 2.0**rescaling.log2, scale * expected, rtol=2e-5, atol=0
            )


def test_what_would_overflow_is_kept_in_bounds() -> None:
    model, images = positive(conv_chain(depth=150, width=16)), torch.ones(1, 16, 6, 6)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(3)
        assert not model(images).isfinite().all()
        rescaling = paths.rescale_between_blocks(model, images)
        assert rescaling is not None
        found = model(images)
        assert found.isfinite().all() and rescaling.log2 > 128
        rescaling.log2 = 0
        expected = copy.deepcopy(model).double()
        for module in expected.modules():
            module._forward_hooks.clear()
        large = expected(images.double())
        model(images)
        torch.testing.assert_close(found.double() * 2.0**rescaling.log2, large, rtol=1e-4, atol=0)


class Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, images: Tensor) -> Tensor:
        return images + self.branch(images)


def test_residual_blocks_that_are_members_of_a_sequence_are_rescaled() -> None:
    torch.manual_seed(0)
    model = positive(nn.Sequential(*(Residual(nn.Conv2d(4, 4, 1)) for _ in range(3))))
    images = torch.ones(1, 4, 3, 3)
    with torch.no_grad():
        expected = model(images)
        rescaling = paths.rescale_between_blocks(model, images)
        assert rescaling is not None
        torch.testing.assert_close(model(images) * 2.0**rescaling.log2, expected)


class SoftmaxAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)

    def forward(self, signal: Tensor) -> Tensor:
        return signal * self.fc(signal).sigmoid()


class Twice(nn.Module):
    """Two sequences side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(4, 4, bias=False))
        self.right = nn.Sequential(nn.Linear(4, 4, bias=False))

    def forward(self, signal: Tensor) -> Tensor:
        return self.left(signal) + self.right(signal)


def shifted() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.constant_(model[1].bias, 0.5)
    return model


NOT_VALID = {
    "softmax attention": lambda: nn.Sequential(SoftmaxAttention(), SoftmaxAttention()),
    "squeeze and excitation": lambda: nn.Sequential(nn.Linear(4, 4, bias=False), SqueezeExcite()),
    "a sequence in a branch": lambda: Residual(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))),
    "two sequences side by side": Twice,
    "a bias": shifted,
    "no sequence": lambda: Residual(nn.Linear(4, 4)),
    "layer norm": lambda: nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4)),
}


@pytest.mark.parametrize("name", NOT_VALID)
def test_nothing_is_rescaled_where_that_would_weigh_paths_differently(name: str) -> None:
    torch.manual_seed(0)
    model = NOT_VALID[name]()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not key.endswith("bias"):
                parameter.abs_().add_(0.1)
    images = torch.rand(1, 3, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    expected = model(images)
    assert paths.rescale_between_blocks(model, images) is None
    assert torch.equal(model(images), expected)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_bias_of_zero_does_not_matter() -> None:
    model = shifted()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
        model[0].bias.zero_()
        model[1].bias.zero_()
    assert paths.rescale_between_blocks(model, torch.ones(1, 4)) is not None


@pytest.mark.parametrize(
    ("name", "valid"),
    [("test_resnet", True), ("test_vit", False), ("test_efficientnet", False)],
)
def test_timms_models(name: str, valid: bool) -> None:
    """Basic blocks can be rescaled; attention and squeeze-and-excitation cannot."""
    model = positive(make_model(name))
    found = paths.rescale_between_blocks(model, torch.ones(1, 1, 16, 16))
    assert (found is not None) is valid


def test_rescaling_asks_for_no_value() -> None:
    """A GPU would have to be waited for at every block; the count is asked for at the end."""
    model, images = positive(conv_chain(depth=12)), torch.ones(1, 8, 6, 6)
    with torch.no_grad():
        rescaling = paths.rescale_between_blocks(model, images)
        assert rescaling is not None
        with Waits() as waits:
            model(images)
        assert waits.count == 0
        assert rescaling.log2 != 0


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_powers_of_two_are_exact(kind: torch.dtype) -> None:
    finfo = torch.finfo(kind)
    for peak in (1.0, 0.75, 2.0**-30, 3 * 2.0**100, finfo.max, finfo.tiny):
        power, exponent = paths._power(torch.tensor([0.0, peak], dtype=kind))
        assert int(exponent) == math.floor(math.log2(float(torch.tensor(peak, dtype=kind)))) or (
            peak == finfo.max
        )
        assert float(power) == 2.0 ** int(exponent)
        assert 1 <= peak / float(power) < 2
    for odd in (0.0, math.inf, math.nan):
        assert [float(each) for each in paths._power(torch.tensor([odd], dtype=kind))] == [1, 0]
