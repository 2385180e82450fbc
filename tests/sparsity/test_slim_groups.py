"""Coupled units: what is told to go together is what slimming cuts."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from autosparse.models.zoo import prunable
from autosparse.sparsity.slim import slim
from autosparse.sparsity.slim_groups import STAYS, Coupled, coupled
from tests.conftest import few
from tests.sparsity.slimming import images_of, spoilt

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = ["test_byobnet", "test_resnet", "test_vit", "test_efficientnet", "test_convnext"]


def net(name: str) -> tuple[nn.Module, int]:
    options = {"img_size": 32, "patch_size": 8} if "vit" in name else {}
    return spoilt(timm.create_model(name, num_classes=5, **options), 1.0), 32


def halved(found: Coupled) -> set[int]:
    """Return the units that go if the second half of every kind does."""
    return {int(unit) for kind in found.kinds for unit in kind[(len(kind) + 1) // 2 :]}


@pytest.mark.parametrize("name", few(MODELS, ["test_byobnet", "test_vit"]))
def test_what_is_told_to_go_together_is_what_slimming_cuts(name: str) -> None:
    model, side = net(name)
    weights = prunable(model)
    found = coupled(model, weights, (3, side, side))
    gone = halved(found)
    left = {}
    for layer, weight in weights.items():
        out, into = (
            torch.tensor([not gone & set(row) for row in table.tolist()])
            for table in found.tables[layer]
        )
        left[layer] = [int(out.sum()), int(into.sum()), *weight.shape[2:]]
        with torch.no_grad():
            weight.mul_((out[:, None] & into).view(*weight.shape[:2], *[1] * (weight.dim() - 2)))
    small = dict(slim(model, images_of(side), multiple=1).named_parameters())
    shrunk = [layer for layer in left if left[layer] != list(weights[layer].shape)]
    assert len(shrunk) > len(left) // 2
    assert {layer: list(small[layer].shape) for layer in left} == left


def test_a_residual_stream_is_one_kind_and_the_classes_stay() -> None:
    model, side = net("test_resnet")
    weights = prunable(model)
    tables = coupled(model, weights, (3, side, side)).tables
    assert (tables["fc.weight"][0] == STAYS).all()
    assert (tables["conv1.0.weight"][1] == STAYS).all()  # Colours of the image.
    first, second = tables["layer2.0.conv1.weight"], tables["layer2.0.conv2.weight"]
    assert (first[0] == second[1]).all()
    stream = tables["layer2.0.downsample.1.weight"]
    last = [name for name in weights if name.startswith("layer2.0.conv")][-1]
    assert (tables[last][0] == stream[0]).all()


def test_heads_and_their_widths_are_two_kinds() -> None:
    model = timm.create_model("test_vit", num_classes=5, img_size=32, patch_size=8)
    found = coupled(model, prunable(model), (3, 32, 32))
    table = found.tables["blocks.0.attn.qkv.weight"][0]
    heads = model.blocks[0].attn.num_heads
    assert table.shape == (192, 2)
    kinds = [set(kind.tolist()) for kind in found.kinds]
    assert sorted(len(set(column)) for column in table.T.tolist()) == sorted([heads, 64 // heads])
    assert all(set(column) in kinds for column in table.T.tolist())
    assert (found.tables["blocks.0.mlp.fc1.weight"][1] == STAYS).all()  # A LayerNorm reads these.


def test_what_a_layer_writes_that_is_not_pruned_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 6, 1))
    free = coupled(model, ["0.weight", "2.weight", "3.weight"], (3, 8, 8))
    assert [len(kind) for kind in free.kinds] == [4, 5]
    held = coupled(model, ["0.weight", "3.weight"], (3, 8, 8))
    assert [len(kind) for kind in held.kinds] == [4]
    assert (held.tables["3.weight"][1] == STAYS).all()


def test_the_model_is_left_as_it_was() -> None:
    model, side = net("test_resnet")
    model.train()
    model.bn1.eval()
    coupled(model, prunable(model), (3, side, side))
    assert model.training and not model.bn1.training and model.layer1.training
