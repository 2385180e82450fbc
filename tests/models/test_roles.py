"""What parameters do is seen, not read from their names."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from autosparse.models import roles
from tests.conftest import make_model

pytestmark = pytest.mark.usefixtures("one_thread")


class Misleading(nn.Module):
    """Names that say the opposite of what their parameters do."""

    def __init__(self) -> None:
        super().__init__()
        self.token_gain = nn.Parameter(torch.full((4,), 1e-5))
        self.gamma = nn.Parameter(torch.zeros(4))
        self.pos_embed_scale = nn.Parameter(torch.zeros(()))
        self.weight_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.gate = nn.Parameter(torch.zeros(()))
        self.open = nn.Parameter(torch.zeros(()))
        self.one_plus = nn.Parameter(torch.zeros(4))
        self.inner, self.read = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        nn.init.zeros_(self.norm.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.gamma.view(1, 1, -1).expand(1, 1, -1)
        tokens = tokens + self.token_gain * self.inner(tokens)
        tokens = tokens + self.gate.tanh() * self.norm(tokens)
        tokens = self.open.sigmoid() * tokens + tokens * (1 + self.one_plus)
        tokens = torch.cat([self.weight_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = torch.addcmul(tokens, self.pos_embed_scale, tokens)
        return functional.linear(tokens, self.read.weight, self.read.bias)


def test_names_do_not_matter() -> None:
    found = roles.of(Misleading(), torch.randn(1, 3, 4))
    assert found.shifts == {
        "gamma", "weight_token", "inner.bias", "read.bias", "norm.bias",
    }  # fmt: skip
    assert found.tokens == {"weight_token"}
    assert set(found.gains) == {
        "token_gain", "gate", "norm.weight", "open", "one_plus", "pos_embed_scale",
    }  # fmt: skip
    assert found.gains["open"] == 0.5 and found.gains["one_plus"] == 1.0
    assert {"read.weight", "read.bias"} <= found.elsewhere
    assert not {"inner.weight", "norm.weight"} & found.elsewhere


def test_what_hides_is_what_is_near_zero_where_it_meets_the_signal() -> None:
    """Not a gate that is a half at zero, nor what is added to one."""
    model, image = Misleading(), torch.randn(1, 3, 4)
    assert roles.faint(model, image) == ["token_gain", "pos_embed_scale", "gate", "norm.weight"]
    assert roles.faint(model, image, 0.0) == ["pos_embed_scale", "gate", "norm.weight"]


def test_the_model_is_left_as_it_was_and_is_not_called_for_nothing() -> None:
    model = make_model("test_resnet").train()
    before = copy.deepcopy(model.state_dict())
    roles.of(model, torch.ones(1, 1, 16, 16))
    assert all(torch.equal(model.state_dict()[name], each) for name, each in before.items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.forward = lambda images: pytest.fail("called")  # type: ignore[method-assign]
    assert roles.faint(model, torch.ones(1, 1, 16, 16)) == []


@pytest.mark.parametrize(
    ("name", "options", "endings"),
    [
        ("test_resnet", {}, ["bn2.weight", "bn3.weight"]),
        ("test_convnext", {}, ["gamma"]),
        ("test_vit2", {"img_size": 32, "patch_size": 8}, ["ls1.gamma", "ls2.gamma"]),
        ("test_vit", {"img_size": 32, "patch_size": 8}, []),
        ("test_nfnet", {}, ["conv3.gain", "skipinit_gain"]),
    ],
)
def test_timms_models(name: str, options: dict, endings: list[str]) -> None:
    model = timm.create_model(name, num_classes=3, **options)
    found = roles.faint(model, torch.ones(1, 3, 32, 32))
    assert all(name.endswith(tuple(endings)) for name in found)
    assert bool(found) == bool(endings)


def test_values_are_put_back_bit_for_bit() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([-0.0, 1e-45]))
    before = model[1].weight.detach().clone().view(torch.int32)
    with pytest.raises(KeyError), roles.replaced(model, {"1.weight": torch.ones(2)}):
        assert torch.equal(model[1].weight, torch.ones(2))
        raise KeyError
    assert torch.equal(model[1].weight.detach().view(torch.int32), before)
