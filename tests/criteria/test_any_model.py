"""Every criterion over every kind of network: timm's tiny models, a mixer, tied weights, attention.

The whole grid is slow; by default every model meets two criteria, and every criterion two models
or three. Models are built once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from autosparse import criteria
from autosparse.autos.network import AutoS
from autosparse.models import zoo
from autosparse.models.config import ModelConfig
from autosparse.sparsity import masks, reach
from autosparse.sparsity.compact import compact_weights, densify
from autosparse.sparsity.ticket import Ticket, compact
from tests.conftest import few, grid

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, SIDE, SPARSITY = 4, 32, 0.9
FEW = {"rounds": 2, "steps_per_level": 2, "levels": 2, "draws": 1, "steps": 2}
SURVIVORS_COUNT = ("force", "iter_snip", "ntk_sap", "px", "synflow")
"""Criteria that prune by themselves: what they kept scores zero or more, the rest less."""
ZERO_GAIN = ("fisher", "grasp", "snip")
"""What sees nothing of test_nfnet's branches, whose last gain starts at zero."""


class Tied(nn.Module):
    """Two Linear layers that share one weight, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 48), nn.Linear(48, 48)
        self.second.weight = self.first.weight
        self.head = nn.Linear(48, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        pooled = avg_pool2d(images, images.shape[-1] // 4).flatten(1)
        return self.head(self.second(self.first(pooled).relu()).relu())


class Attention(nn.Module):
    """nn.MultiheadAttention over pooled pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(avg_pool2d(images, images.shape[-1] // 4).flatten(2).transpose(1, 2))
        mixed = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head((tokens + mixed).mean(1))


def timm_model(name: str, size: int = SIDE) -> nn.Module:
    options = {"patch_size": 8} if name.startswith("test_vit") else {}
    config = ModelConfig(name, options)
    return zoo.create(config, num_classes=CLASSES, in_chans=3, image_size=size, seed=0)


def mixer() -> nn.Module:
    """A tiny MLP-mixer; timm starts its head at zero, which hides all else from gradients."""
    model = MlpMixer(num_classes=CLASSES, img_size=SIDE, patch_size=8, num_blocks=2, embed_dim=16)
    nn.init.normal_(model.head.weight, std=0.1)
    return model


OWN: dict[str, Callable[[], nn.Module]] = {"mixer": mixer, "tied": Tied, "attention": Attention}
TIMM = timm.list_models("test_*")
MODELS = [*TIMM, *OWN]


@cache
def model_of(name: str) -> nn.Module:
    if name in TIMM:
        return timm_model(name)
    torch.manual_seed(0)
    return OWN[name]()


@cache
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, SIDE, SIDE, generator=generator)
    return images, torch.arange(8) % CLASSES


def everything_of(model: nn.Module) -> dict[str, Any]:
    """Return copies of all that a criterion must not change."""
    hooks = {
        (name, key): len(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key.endswith("_hooks")
    }
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "gradients": [name for name, each in model.named_parameters() if each.grad is not None],
        "frozen": [name for name, each in model.named_parameters() if not each.requires_grad],
        "modes": {name: module.training for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "children": {name: id(module) for name, module in model.named_modules()},
        "identities": {name: id(each) for name, each in model.named_parameters()},
        "hooks": hooks,
    }


def outputs_of(model: nn.Module) -> Tensor:
    """Return the outputs in eval mode, the modes as they were."""
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        return twin(batch()[0])


@cache
def untouched(name: str) -> tuple[dict[str, Any], Tensor]:
    return everything_of(model_of(name)), outputs_of(model_of(name))


def assert_left_alone(name: str) -> None:
    before, outputs = untouched(name)
    after = everything_of(model_of(name))
    assert all(torch.equal(after["state"][key], each) for key, each in before["state"].items())
    for part in before.keys() - {"state"}:
        assert after[part] == before[part], part
    assert torch.equal(outputs_of(model_of(name)), outputs)


def removed(total: int) -> int:
    """Return 90 % of `total`, halves up, in whole numbers."""
    return (18 * total + 10) // 20


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("scorer") / "autos.safetensors"
    AutoS("context").save(path)
    AutoS("context", [4], head="survival").save(path.with_name("heads.safetensors"))
    return str(path)


def scores_of(name: str, criterion: str, scorer: str) -> dict[str, Tensor]:
    found = criteria.get(criterion)
    file = scorer.replace("autos.", "heads.") if criterion == "autos_irp" else scorer
    options = {"scorer": file, "sparsity": SPARSITY, **FEW}
    options = {key: value for key, value in options.items() if key in found.options}
    return found(model_of(name), [batch()], cross_entropy, **options)


@pytest.mark.parametrize(("name", "criterion"), grid(MODELS, criteria.names()))
def test_a_criterion_on_a_model(name: str, criterion: str, scorer: str) -> None:
    weights = zoo.prunable(model_of(name))
    untouched(name)
    scores = scores_of(name, criterion, scorer)
    assert_left_alone(name)

    assert [(key, each.shape) for key, each in scores.items()] == [
        (key, each.shape) for key, each in weights.items()
    ]
    assert all(score.isfinite().all() for score in scores.values())
    flat = torch.cat([score.flatten() for score in scores.values()])
    assert flat.min() < flat.max()
    hidden = name == "test_nfnet" and criterion in ZERO_GAIN
    chooses = flat.dtype == torch.bool
    if not hidden and not chooses:
        assert [key for key, each in scores.items() if each.min() == each.max()] == []

    chosen = masks.from_scores(scores, SPARSITY)
    assert sum(int(mask.sum()) for mask in chosen.values()) == len(flat) - removed(len(flat))
    if chooses:
        assert all(torch.equal(chosen[key], each) for key, each in scores.items())
    if criterion in SURVIVORS_COUNT:
        assert all(torch.equal(chosen[key], each >= 0) for key, each in scores.items())


@pytest.mark.parametrize("name", few(MODELS, MODELS[::4]))
def test_criteria_do_not_all_say_the_same(name: str, scorer: str) -> None:
    """Three that look at different things keep different weights."""
    found = {
        masks.fingerprint(masks.from_scores(scores_of(name, criterion, scorer), SPARSITY))
        for criterion in ("magnitude", "random", "snip")
    }
    assert len(found) == 3


def test_no_branch_of_an_nfnet_is_hidden_from_gradients(scorer: str) -> None:
    scores = scores_of("test_nfnet", "snip", scorer)
    assert [key for key, each in scores.items() if not each.any()] == []


# Live paths


def sees_pixels(length: int, kernel: int, stride: int, dilation: int, before: int, after: int):
    """Return, for one axis, which places of the kernel ever lie on a pixel."""
    places = length + before + after - dilation * (kernel - 1)
    found = [
        any(0 <= start + dilation * place - before < length for start in range(0, places, stride))
        for place in range(kernel)
    ]
    return torch.tensor(found)


def padding_of(conv: nn.Conv2d, axis: int, length: int) -> tuple[int, int]:
    if not (getattr(conv, "same_pad", False) or type(conv).__name__ == "Conv2dSame"):
        return conv.padding[axis], conv.padding[axis]
    windows = -(-length // conv.stride[axis])
    reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
    missing = max((windows - 1) * conv.stride[axis] + reach - length, 0)
    return missing // 2, missing - missing // 2


def not_only_padding(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return all prunable weights but those at kernel positions that see padding only."""
    sizes: dict[str, tuple[int, int]] = {}

    def record(name: str) -> Callable:
        return lambda module, inputs: sizes.__setitem__(name, tuple(inputs[0].shape[-2:]))

    twin = copy.deepcopy(model).eval()
    for name, module in twin.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(record(name))
    with torch.no_grad():
        twin(images)
    found = {}
    for name, weight in zoo.prunable(model).items():
        found[name] = torch.ones(weight.shape, dtype=torch.bool)
        path = name.removesuffix(".weight")
        if path in sizes:
            conv = twin.get_submodule(path)
            rows, columns = (
                sees_pixels(
                    length, conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis],
                    *padding_of(conv, axis, length),
                )
                for axis, length in enumerate(sizes[path])
            )  # fmt: skip
            found[name] &= rows[:, None] & columns[None, :]
    return found


def dense_masks(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.ones(weight.shape, dtype=torch.bool)
        for name, weight in zoo.prunable(model).items()
    }


def numbers_that_differ(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, int]:
    assert list(found) == list(expected)
    differ = {name: int((found[name] ^ expected[name]).sum()) for name in expected}
    return {name: count for name, count in differ.items() if count}


AT_64 = ("test_coatnet", "test_maxvit")
"""At 32 px their last attention has a single token, for which queries and keys do not count."""


@pytest.mark.parametrize("name", MODELS)
def test_all_of_a_dense_model_is_live_but_what_sees_padding_only(name: str) -> None:
    size = 64 if name in AT_64 else SIDE
    model = timm_model(name, size) if name in AT_64 else model_of(name)
    expected = not_only_padding(model, torch.randn(1, 3, size, size))
    found = reach.live(model, dense_masks(model), (3, size, size))
    assert numbers_that_differ(found, expected) == {}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_live_lies_within_the_masks(name: str) -> None:
    model = model_of(name)
    generator = torch.Generator().manual_seed(1)
    weights = zoo.prunable(model)
    scores = {key: torch.rand(each.shape, generator=generator) for key, each in weights.items()}
    chosen = masks.from_scores(scores, SPARSITY)
    untouched(name)
    found = reach.live(model, chosen, (3, SIDE, SIDE))
    assert_left_alone(name)
    possible = not_only_padding(model, batch()[0])
    assert 0 < masks.kept(found) <= masks.kept(chosen)
    for key, mask in chosen.items():
        assert found[key].dtype == torch.bool
        assert not (found[key] & ~mask).any()
        if key.endswith(".weight"):
            assert not (found[key] & ~possible[key]).any(), key


def test_live_weights_of_a_resnet_are_those_that_change_the_output() -> None:
    """With nothing negative, norms at the identity and no shifts, raise one weight at a time."""
    model = copy.deepcopy(model_of("test_resnet")).double().eval()
    generator = torch.Generator().manual_seed(2)
    weights = zoo.prunable(model)
    scores = {key: torch.rand(each.shape, generator=generator) for key, each in weights.items()}
    chosen = masks.from_scores(scores, 0.97)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.weight.fill_(1)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
        for name, weight in weights.items():
            weight.copy_(chosen[name] * (torch.rand(weight.shape, generator=generator) + 0.5))
    images = torch.rand(1, 3, SIDE, SIDE, generator=generator, dtype=torch.float64) + 0.5
    found, seen = reach.live(model, chosen, (3, SIDE, SIDE)), {True: 0, False: 0}
    with torch.no_grad():
        before = model(images)
        for name, weight in weights.items():
            kept, flat = chosen[name].flatten().nonzero().squeeze(1), weight.view(-1)
            for place in kept[:: max(1, len(kept) // 12)].tolist():
                value = flat[place].item()
                flat[place] = 1e6
                changes = not torch.equal(model(images), before)
                flat[place] = value
                assert bool(found[name].view(-1)[place]) == changes, (name, place)
                seen[changes] += 1
    assert min(seen.values()) > 10, seen


# Tied weights count once


@pytest.mark.parametrize("criterion", criteria.names())
def test_a_tied_weight_has_one_score_and_one_mask(criterion: str, scorer: str) -> None:
    scores = scores_of("tied", criterion, scorer)
    assert list(scores) == ["first.weight", "head.weight"]
    chosen = masks.from_scores(scores, SPARSITY)
    model = copy.deepcopy(model_of("tied"))
    kept = compact(model, Ticket.from_model(model, chosen, {}))
    first, second = (each.parametrizations.weight for each in (kept.first, kept.second))
    assert first.original is second.original
    values = [each.numel() for name, each in kept.named_parameters() if "original" in name]
    assert sum(values) == masks.kept(chosen) == 2496 - removed(2496)
    assert torch.equal(kept.first.weight != 0, chosen["first.weight"])
    assert torch.equal(kept.second.weight, kept.first.weight)


def test_a_tied_weights_gradient_is_that_of_both_its_uses() -> None:
    """Written with two weights of their own, |θ * (one gradient + the other)|."""
    model, (images, labels) = model_of("tied"), batch()
    scores = criteria.get("snip")(model, [batch()], cross_entropy)
    first = model.first.weight.detach().clone().requires_grad_()
    second = model.first.weight.detach().clone().requires_grad_()
    pooled = avg_pool2d(images, SIDE // 4).flatten(1)
    hidden = (pooled @ first.t() + model.first.bias).relu()
    hidden = (hidden @ second.t() + model.second.bias).relu()
    cross_entropy(model.head(hidden), labels).backward()
    for parameter in model.parameters():
        parameter.grad = None
    assert first.grad.any() and second.grad.any()
    expected = (first * (first.grad + second.grad)).abs().detach()
    torch.testing.assert_close(scores["first.weight"], expected)


@pytest.mark.parametrize("name", MODELS)
def test_any_model_is_compacted_and_densified(name: str) -> None:
    """Compact, the model gives what it gives with zeros, and the same again when dense."""
    generator = torch.Generator().manual_seed(3)
    weights = zoo.prunable(model_of(name))
    scores = {key: torch.rand(each.shape, generator=generator) for key, each in weights.items()}
    chosen = masks.from_scores(scores, SPARSITY)
    model = copy.deepcopy(model_of(name)).double().eval()
    compact(model, Ticket.from_model(model, chosen, {}))
    assert {key for key, _ in compact_weights(model)} >= set(chosen)
    small = sum(each.numel() for each in model.parameters())
    large = sum(each.numel() for each in model_of(name).parameters())
    assert large - small == removed(masks.total(chosen))
    with torch.no_grad():
        images = batch()[0].double()
        outputs = model(images)
        torch.testing.assert_close(densify(model)(images), outputs, rtol=1e-10, atol=1e-10)
        if name != "test_nfnet":
            plain = copy.deepcopy(model_of(name)).double().eval()
            for key, mask in chosen.items():
                plain.get_parameter(key).mul_(mask)
            torch.testing.assert_close(plain(images), outputs, rtol=1e-10, atol=1e-10)
