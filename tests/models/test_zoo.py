"""Models: which weights are prunable, what is excluded, and models that can be built again."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from autosparse.core.errors import UsageError
from autosparse.models import zoo
from autosparse.models.config import ModelConfig

STEM_AND_HEAD = {
    "test_byobnet": ("stem.conv.weight", "head.fc.weight"),
    "test_convnext": ("stem.0.weight", "head.fc.weight"),
    "test_efficientnet": ("conv_stem.weight", "classifier.weight"),
    "test_mambaout": ("stem.conv1.weight", "head.fc.weight"),
    "test_nfnet": ("stem.conv1.weight", "head.fc.weight"),
    "test_resnet": ("conv1.0.weight", "fc.weight"),
    "test_vit": ("patch_embed.proj.weight", "head.weight"),
}


def build(name: str, seed: int = 0, exclude: tuple[str, ...] = (), **options) -> nn.Module:
    config = ModelConfig(name, options, list(exclude))
    return zoo.create(config, num_classes=10, in_chans=1, image_size=32, seed=seed)


def same_state(ours: nn.Module, theirs: nn.Module) -> bool:
    mine, other = ours.state_dict(), theirs.state_dict()
    return mine.keys() == other.keys() and all(
        torch.equal(mine[name], other[name]) for name in mine
    )


# Prunable


@pytest.mark.parametrize("name", ["test_byobnet", "test_efficientnet", "test_nfnet", "test_resnet"])
def test_in_conv_nets_every_weight_but_those_of_norms_is_prunable(name: str) -> None:
    model = build(name)
    weights = [
        each
        for each, parameter in model.named_parameters()
        if each.endswith(".weight") and parameter.ndim > 1
    ]
    assert list(zoo.prunable(model)) == weights


def test_in_a_vit_the_projections_are_prunable() -> None:
    model = build("test_vit")
    blocks = [
        f"blocks.{block}.{part}.weight"
        for block in range(6)
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert list(zoo.prunable(model)) == ["patch_embed.proj.weight", *blocks, "head.weight"]
    assert zoo.prunable(model)["blocks.0.attn.qkv.weight"].shape == (3 * 64, 64)


def test_prunable_gives_the_parameters_themselves() -> None:
    model = build("test_resnet")
    found = zoo.prunable(model)
    assert all(model.get_parameter(name) is parameter for name, parameter in found.items())


def test_biases_norms_and_embeddings_are_not_prunable() -> None:
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(5, 4),
            "conv1": nn.Conv1d(4, 4, 3),
            "conv3": nn.Conv3d(1, 2, 3),
            "norm": nn.BatchNorm2d(4),
            "layer_norm": nn.LayerNorm((4, 4)),
            "slope": nn.PReLU(4),
            "linear": nn.Linear(4, 2),
        }
    )
    model.register_parameter("position", nn.Parameter(torch.zeros(1, 5, 4)))
    assert list(zoo.prunable(model)) == ["conv1.weight", "conv3.weight", "linear.weight"]


def test_multihead_attention() -> None:
    same = zoo.prunable(nn.Sequential(nn.MultiheadAttention(8, 2, add_bias_kv=True)))
    assert {name: tuple(weight.shape) for name, weight in same.items()} == {
        "0.in_proj_weight": (24, 8),
        "0.out_proj.weight": (8, 8),
    }
    different = zoo.prunable(nn.MultiheadAttention(8, 2, kdim=4, vdim=6))
    assert {name: tuple(weight.shape) for name, weight in different.items()} == {
        "q_proj_weight": (8, 8),
        "k_proj_weight": (8, 4),
        "v_proj_weight": (8, 6),
        "out_proj.weight": (8, 8),
    }


def test_tied_weights_are_found_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    assert list(zoo.prunable(model)) == ["0.weight", "1.weight"]


def test_no_prunable_weight() -> None:
    with pytest.raises(UsageError, match="Embedding has no prunable weight"):
        zoo.prunable(nn.Embedding(3, 2))


# Exclude


@pytest.mark.parametrize("name", STEM_AND_HEAD)
def test_stem_and_head_are_what_timm_records(name: str) -> None:
    model = build(name)
    stem, head = STEM_AND_HEAD[name]
    everything = list(zoo.prunable(model))
    assert set(everything) - set(zoo.prunable(model, ["stem"])) == {stem}
    assert set(everything) - set(zoo.prunable(model, ["head"])) == {head}
    without = [each for each in everything if each not in (stem, head)]
    assert list(zoo.prunable(model, ["head", "stem"])) == without


def test_a_model_with_two_heads() -> None:
    model = build("deit_tiny_distilled_patch16_224", depth=1, embed_dim=24)
    excluded = set(zoo.prunable(model)) - set(zoo.prunable(model, ["head"]))
    assert excluded == {"head.weight", "head_dist.weight"}


@pytest.mark.parametrize(
    ("pattern", "excluded"),
    [
        ("fc", {"fc.weight"}),
        ("fc.weight", {"fc.weight"}),
        ("layer1.*.conv2", {"layer1.0.conv2.weight"}),
        (
            "layer[12]",
            {
                "layer1.0.conv1.weight",
                "layer1.0.conv2.weight",
                "layer2.0.conv1.weight",
                "layer2.0.conv2.weight",
                "layer2.0.downsample.1.weight",
            },
        ),
        (
            "*.downsample",
            {f"layer{layer}.0.downsample.1.weight" for layer in (2, 3, 4)},
        ),
    ],
)
def test_patterns_match_names_and_modules(pattern: str, excluded: set[str]) -> None:
    model = build("test_resnet")
    assert set(zoo.prunable(model)) - set(zoo.prunable(model, [pattern])) == excluded


def test_a_plain_name_is_no_prefix() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "fc2": nn.Linear(2, 2)})
    assert list(zoo.prunable(model, ["fc"])) == ["fc2.weight"]


@pytest.mark.parametrize("patterns", [["head", "fc"], ["layer4", "layer4.0.*"], ["fc", "fc"]])
def test_patterns_may_overlap(patterns: list[str]) -> None:
    model = build("test_resnet")
    wider, narrower = zoo.prunable(model, patterns[:1]), zoo.prunable(model, patterns)
    assert list(narrower) == list(wider)


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [("layre4", "layer4"), ("fcc", "fc"), ("layer3.0.conv9", "layer3.0.conv")],
)
def test_an_unknown_pattern_names_the_nearest(pattern: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=rf"{pattern}.*Did you mean '{nearest}") as caught:
        zoo.prunable(build("test_resnet"), [pattern])
    assert caught.value.exit_code == 2


def test_nothing_left_to_prune() -> None:
    with pytest.raises(UsageError, match="no prunable weight"):
        zoo.prunable(build("test_resnet"), ["*"])


# Create


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_the_seed_fixes_the_weights(name: str) -> None:
    assert same_state(build(name, seed=1), build(name, seed=1))
    assert not same_state(build(name, seed=1), build(name, seed=2))


@pytest.mark.parametrize("name", timm.list_models("test_*"))
def test_creation_leaves_the_global_rngs_alone(name: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    build(name)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_creation_seeds_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    config = ModelConfig("test_byobnet", {})
    zoo.create(config, num_classes=3, in_chans=3, image_size=32, seed=5)
    assert not seeds


def test_the_weights_do_not_depend_on_the_global_rng() -> None:
    torch.manual_seed(5)
    first = build("test_resnet")
    torch.manual_seed(6)
    assert same_state(build("test_resnet"), first)


def last_norms(model: nn.Module) -> list[Tensor]:
    """Return the weights of the last norm of every residual branch of a test_resnet."""
    return [
        next(m for m in reversed(list(block.children())) if isinstance(m, nn.BatchNorm2d)).weight
        for layer in (model.layer2, model.layer3, model.layer4)
        for block in layer
    ]


def test_residual_branches_do_not_start_at_zero_unless_asked() -> None:
    ours = last_norms(build("test_resnet"))
    timms = last_norms(build("test_resnet", zero_init_last=True))
    assert len(ours) == len(timms) == 3
    assert all((weight == 1).all() for weight in ours)
    assert all((weight == 0).all() for weight in timms)


def test_a_created_model_is_for_the_data() -> None:
    config = ModelConfig("test_vit", {"patch_size": 4})
    model = zoo.create(config, num_classes=7, in_chans=1, image_size=16, seed=0)
    assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 7)


def test_options_reach_timm() -> None:
    assert build("test_vit", depth=2, patch_size=8).patch_embed.proj.kernel_size == (8, 8)
    assert len(build("test_vit", depth=2).blocks) == 2


@pytest.mark.parametrize(
    ("name", "nearest"), [("test_resnt", "test_resnet"), ("resnet_18", "resnet18")]
)
def test_an_unknown_model_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=f"unknown model '{name}'. Did you mean '{nearest}'"):
        build(name)


def test_options_that_timm_does_not_take() -> None:
    with pytest.raises(UsageError, match=r"timm cannot build test_resnet.*deepness"):
        build("test_resnet", deepness=3)


# Recipes


@pytest.mark.parametrize(
    ("name", "options"), [("test_resnet", {"zero_init_last": True}), ("test_vit", {"depth": 2})]
)
def test_from_recipe_builds_the_same_weights(name: str, options: dict[str, object]) -> None:
    model = build(name, seed=11, exclude=("head",), **options)
    recipe = json.loads(json.dumps(model.autosparse_recipe))
    again = zoo.from_recipe(recipe)
    assert same_state(again, model)
    assert again.autosparse_recipe == model.autosparse_recipe


def test_a_recipe_says_what_create_was_given() -> None:
    model = build("test_vit", seed=11, exclude=("head",), depth=2)
    assert model.autosparse_recipe == {
        "name": "test_vit",
        "options": {"depth": 2},
        "exclude": ["head"],
        "num_classes": 10,
        "in_chans": 1,
        "image_size": 32,
        "seed": 11,
    }


def test_a_card_without_a_recipe() -> None:
    with pytest.raises(UsageError, match="does not say how its model was built"):
        zoo.from_recipe({"class": "Sequential"})


# Small ones


def test_owner() -> None:
    model = build("test_vit")
    assert zoo.owner(model, "blocks.0.attn.qkv.weight") == (model.blocks[0].attn.qkv, "weight")
    linear = nn.Linear(2, 2)
    assert zoo.owner(linear, "weight") == (linear, "weight")


def test_devices() -> None:
    assert zoo.device_of(nn.Linear(2, 2)) == torch.device("cpu")
    assert zoo.choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match=r"unknown device 'cudda'.*'cuda'"):
        zoo.choose_device("cudda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU")
def test_a_device_without_float64() -> None:
    with pytest.raises(UsageError, match="device mps lacks float64"):
        zoo.choose_device("mps")


def test_a_device_that_is_not_there() -> None:
    assert zoo.choose_device("auto") == torch.device("cpu")
    with pytest.raises(UsageError, match="sees no GPU"):
        zoo.choose_device("cuda:0")


def test_a_small_stem_keeps_the_resolution():
    config = ModelConfig("resnet18", small_stem=True)
    model = zoo.create(config, num_classes=10, in_chans=3, image_size=32, seed=0)
    assert model.conv1.weight.shape == (64, 3, 3, 3)
    assert model.eval().forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 4, 4)
    again = zoo.from_recipe(model.autosparse_recipe)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


def test_a_small_stem_is_for_resnets():
    with pytest.raises(UsageError, match="small_stem"):
        zoo.create(
            ModelConfig("test_vit", {"patch_size": 4}, small_stem=True),
            num_classes=10, in_chans=3, image_size=32, seed=0,
        )  # fmt: skip
