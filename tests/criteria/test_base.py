"""Criteria: the promises that all of them keep, and each by hand or by another formula."""

from __future__ import annotations

import copy
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from autosparse import criteria
from autosparse.autos import features
from autosparse.autos.network import AutoS
from autosparse.core.errors import UsageError
from autosparse.criteria import base
from autosparse.models import zoo
from autosparse.models.config import ModelConfig
from autosparse.sparsity import masks
from autosparse.sparsity.counts import keep_count

Batches = list[tuple[Tensor, Tensor]]


def batches_of(*sizes: int, shape: tuple[int, ...], classes: int, seed: int = 0) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, *shape, generator=generator),
            torch.randint(0, classes, (size,), generator=generator),
        )
        for size in sizes
    ]


def net_with_everything() -> nn.Module:
    """Convolution, batch norm, dropout, a layer in eval mode, a frozen weight, a gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(6, 6, 3, stride=2, groups=3, bias=False),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(6 * 9, 4),
    )
    model.train()
    model[5].eval()
    model[1].running_mean.normal_()
    model[4].weight.requires_grad_(False)
    model[7].weight.grad = torch.randn(4, 54)
    return model


def mlp(*widths: int, bias: bool = True, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@pytest.fixture(scope="session")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("scorer") / "autos.safetensors"
    autos = AutoS("context")
    autos.card = {"corpus": "0123456789abcdef"}
    autos.save(path)
    AutoS("context", [4], head="survival").save(path.with_name("heads.safetensors"))
    return str(path)


SHORT_LEVELS = {"steps_per_level": 2, "levels": 2}


def needed(name: str, scorer: str) -> dict[str, Any]:
    """Return the options that a criterion cannot do without."""
    if name == "autos_irp":
        return {"scorer": scorer.replace("autos.", "heads."), **SHORT_LEVELS, "sparsity": 0.7}
    if name == "autos":
        return {"scorer": scorer, "sparsity": 0.7}
    few = {"rounds": 2, "steps_per_level": 2, "levels": 2, "draws": 2, "steps": 2}
    known = criteria.get(name).options
    return {key: value for key, value in {"sparsity": 0.7, **few}.items() if key in known}


# Promises of all of them


@pytest.mark.parametrize("exclude", [(), ("4",)], ids=["all", "excluded"])
@pytest.mark.parametrize("name", criteria.names())
def test_a_finite_score_or_a_bool_per_prunable_weight(
    name: str, exclude: tuple[str, ...], scorer: str
) -> None:
    model, batches = net_with_everything(), batches_of(8, 5, shape=(1, 8, 8), classes=4)
    options, criterion = needed(name, scorer), criteria.get(name)
    scores = criterion(model, batches, cross_entropy, exclude=exclude, **options)
    parameters = zoo.prunable(model, exclude)
    assert list(scores) == list(parameters)
    for layer, score in scores.items():
        assert score.shape == parameters[layer].shape
        assert score.is_floating_point() or score.dtype == torch.bool
        assert score.isfinite().all()
        assert not score.requires_grad
    if criterion.makes_choice(options):
        assert masks.kept(scores) == keep_count(masks.total(scores), 0.7)
    assert criterion.makes_choice(options) == (name in ("autos_irp", "cts", "short_irp"))


@pytest.mark.parametrize("name", criteria.names())
def test_the_seed_fixes_the_scores(name: str, scorer: str) -> None:
    batches = batches_of(8, 5, shape=(1, 8, 8), classes=4)
    found = []
    for _ in range(2):
        model = net_with_everything()
        torch.manual_seed(4)
        found.append(criteria.get(name)(model, batches, cross_entropy, **needed(name, scorer)))
    assert all(torch.equal(found[0][layer], found[1][layer]) for layer in found[0])


def everything_of(model: nn.Module) -> dict[str, Any]:
    """Return copies of all that a criterion must not change."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "gradients": {name: copy.deepcopy(each.grad) for name, each in model.named_parameters()},
        "needed": {name: each.requires_grad for name, each in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: len(module._forward_hooks) for name, module in model.named_modules()},
        "identities": {name: id(each) for name, each in model.named_parameters()},
    }


@pytest.mark.parametrize("name", criteria.names())
def test_the_model_is_left_as_it_was(name: str, scorer: str) -> None:
    model, batches = net_with_everything(), batches_of(8, 5, shape=(1, 8, 8), classes=4)
    before = everything_of(model)
    criteria.get(name)(model, batches, cross_entropy, **needed(name, scorer))
    after = everything_of(model)
    for part in ("needed", "modes", "hooks", "identities"):
        assert after[part] == before[part], part
    for layer, tensor in before["state"].items():
        assert torch.equal(after["state"][layer], tensor), layer
    for layer, gradient in before["gradients"].items():
        if gradient is None:
            assert after["gradients"][layer] is None, layer
        else:
            assert torch.equal(after["gradients"][layer], gradient), layer


@pytest.mark.parametrize("name", criteria.names())
def test_the_rng_and_the_batches_are_left_as_they_were(name: str, scorer: str) -> None:
    model, batches = net_with_everything(), batches_of(8, 5, shape=(1, 8, 8), classes=4)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    criteria.get(name)(model, batches, cross_entropy, **needed(name, scorer))
    assert torch.equal(torch.get_rng_state(), before)
    again = batches_of(8, 5, shape=(1, 8, 8), classes=4)
    for ours, theirs in zip(batches, again, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("name", criteria.names())
def test_an_unknown_option(name: str, scorer: str) -> None:
    batches = batches_of(4, shape=(3,), classes=2)
    with pytest.raises(UsageError, match=rf"unknown option of {name} 'bogus'"):
        criteria.get(name)(mlp(3, 2), batches, cross_entropy, **needed(name, scorer), bogus=1)


@pytest.mark.parametrize("name", ["erk", "synflow"])
def test_a_missing_option(name: str) -> None:
    batches = batches_of(4, shape=(3,), classes=2)
    with pytest.raises(UsageError, match=f"{name} needs the option sparsity"):
        criteria.get(name)(mlp(3, 2), batches, cross_entropy)


@pytest.mark.parametrize(
    "name", [name for name in criteria.names() if criteria.get(name).needs_data]
)
def test_data_is_needed(name: str, scorer: str) -> None:
    assert criteria.get(name).needs_data
    with pytest.raises(UsageError, match=f"{name} needs data"):
        criteria.get(name)(mlp(3, 2), [], cross_entropy, **needed(name, scorer))


@pytest.mark.parametrize("name", ["erk", "lamp", "magnitude", "random", "synflow"])
def test_data_is_not_needed(name: str, scorer: str) -> None:
    config = ModelConfig("test_byobnet")
    model = zoo.create(config, num_classes=3, in_chans=1, image_size=16, seed=0)
    assert not criteria.get(name).needs_data
    scores = criteria.get(name)(model, [], cross_entropy, **needed(name, scorer))
    assert list(scores) == list(zoo.prunable(model))


def test_an_unknown_criterion_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown criterion 'snyp'.*'snip'"):
        criteria.get("snyp")


def test_scores_that_are_not_finite_name_criterion_and_layer() -> None:
    model = mlp(3, 4, 2)
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(UsageError, match=r"magnitude: the scores of 2\.weight are not finite"):
        criteria.get("magnitude")(model, [], cross_entropy)


# Scores or masks


def registered(returned: dict[str, Tensor], **promise: Any) -> base.Criterion:
    return base.Criterion("mine", lambda *_, **__: returned, needs_data=False, **promise)


def test_what_a_criterion_returns_is_what_it_is_registered_for() -> None:
    scores = {"0.weight": torch.rand(2, 3)}
    chosen = {"0.weight": torch.rand(2, 3) > 0.5}
    assert registered(scores)(mlp(3, 2), [], cross_entropy).keys() == scores.keys()
    with pytest.raises(TypeError, match="mine returned masks; register it with chooses=True"):
        registered(chosen)(mlp(3, 2), [], cross_entropy)
    with pytest.raises(TypeError, match="mine is registered with chooses, and returned no bool"):
        registered(scores, chooses=True)(mlp(3, 2), [], cross_entropy)


def test_a_choice_of_another_number_than_was_asked_for() -> None:
    def choose(model, parameters, batches, loss_fn, *, sparsity: float) -> dict[str, Tensor]:
        return {"0.weight": torch.tensor([[True, False, False], [True, False, True]])}

    mine = base.Criterion("mine", choose, needs_data=False, chooses=True)
    assert masks.kept(mine(mlp(3, 2), [], cross_entropy, sparsity=0.5)) == 3
    with pytest.raises(UsageError, match="mine chose 3 of 6 weights, not as many"):
        mine(mlp(3, 2), [], cross_entropy, sparsity=2 / 3)


def test_options_may_decide_whether_a_criterion_chooses(scorer: str) -> None:
    autos = criteria.get("autos")
    assert autos.makes_choice({"scorer": scorer.replace("autos.", "heads."), "seed": 1})
    assert not autos.makes_choice({"scorer": scorer})


# Magnitude and random


def test_magnitude_is_the_absolute_weight() -> None:
    model = mlp(2, 2)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-3.0, 0.0], [0.5, 2.0]]))
    scores = criteria.get("magnitude")(model, [], cross_entropy)
    assert scores["0.weight"].tolist() == [[3.0, 0.0], [0.5, 2.0]]


def test_random_is_uniform_and_fixed_by_its_seed() -> None:
    model = mlp(50, 40, 30)
    first, again, other = (
        criteria.get("random")(model, [], cross_entropy, seed=seed) for seed in (1, 1, 2)
    )
    flat = torch.cat([score.flatten() for score in first.values()])
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert flat.min() >= 0 and flat.max() < 1
    tenths = flat.histc(10, 0, 1) / flat.numel()
    assert (tenths - 0.1).abs().max() < 0.03


def test_random_with_scope_layer_keeps_the_same_density_everywhere() -> None:
    scores = criteria.get("random")(mlp(20, 15, 4), [], cross_entropy)
    chosen = masks.from_scores(scores, 0.9, scope="layer")
    assert [int(mask.sum()) for mask in chosen.values()] == [30, 6]


# SNIP


def smooth_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def loss_under_mask(
    model: nn.Module, name: str, place: int, mask: float, batch: tuple[Tensor, Tensor]
) -> float:
    """Return the loss when one entry of the mask is `mask` and all others are one."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[place] *= mask
        return cross_entropy(model(batch[0]), batch[1]).item()


@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_snip_is_the_slope_of_the_loss_in_the_mask(name: str) -> None:
    model = smooth_net()
    pixels, labels = batches_of(6, shape=(3,), classes=2)[0]
    batch, step = (pixels.double(), labels), 1e-5
    scores = criteria.get("snip")(model, [batch], cross_entropy)[name].flatten()
    for place, score in enumerate(scores.tolist()):
        above = loss_under_mask(model, name, place, 1 + step, batch)
        below = loss_under_mask(model, name, place, 1 - step, batch)
        assert score == pytest.approx(abs(above - below) / (2 * step), rel=1e-4, abs=1e-9)


def normed_net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model.double()


@pytest.mark.parametrize("sizes", [(5, 3), (1, 6, 1), (2, 2, 2, 2)])
def test_snip_in_eval_mode_does_not_depend_on_the_batch_size(sizes: tuple[int, ...]) -> None:
    model = normed_net()
    pixels, labels = batches_of(8, shape=(3,), classes=2)[0]
    pixels = pixels.double()
    cut = list(zip(pixels.split(list(sizes)), labels.split(list(sizes)), strict=True))
    snip = criteria.get("snip")
    whole = snip(model, [(pixels, labels)], cross_entropy, training_mode=False)
    parts = snip(model, cut, cross_entropy, training_mode=False)
    for name, score in whole.items():
        torch.testing.assert_close(parts[name], score, rtol=1e-10, atol=1e-15)


def test_snip_in_training_mode_uses_the_statistics_of_the_batch() -> None:
    model = normed_net()
    pixels, labels = batches_of(8, shape=(3,), classes=2)[0]
    pixels = pixels.double()
    scores = criteria.get("snip")(model.eval(), [(pixels, labels)], cross_entropy)
    model.train()
    cross_entropy(model(pixels), labels).backward()
    for name in ("0.weight", "3.weight"):
        weight = model.get_parameter(name)
        torch.testing.assert_close(scores[name], (weight * weight.grad).abs().detach())


# SynFlow


def path_sums(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """For each weight of two layers, add up |w| along every path that runs through it."""
    sums = torch.zeros(first.shape), torch.zeros(second.shape)
    for inputs in range(first.shape[1]):
        for hidden in range(first.shape[0]):
            for outputs in range(second.shape[0]):
                product = abs(first[hidden, inputs].item() * second[outputs, hidden].item())
                sums[0][hidden, inputs] += product
                sums[1][outputs, hidden] += product
    return sums


def power_of_two(found: Tensor, expected: Tensor) -> float:
    """Return found / expected, which SynFlow may choose as long as it is a power of two."""
    power = math.log2(float(found.sum() / expected.sum()))
    assert power == pytest.approx(round(power), abs=1e-5)
    return 2.0 ** round(power)


def two_linear_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))


def test_synflow_adds_up_the_paths_through_a_weight() -> None:
    model, batches = two_linear_layers(), batches_of(2, shape=(3,), classes=2)
    scores = criteria.get("synflow")(model, batches, cross_entropy, sparsity=0.0, rounds=1)
    expected = path_sums(model[0].weight, model[1].weight)
    factor = power_of_two(scores["0.weight"], expected[0])
    torch.testing.assert_close(scores["0.weight"], factor * expected[0])
    torch.testing.assert_close(scores["1.weight"], factor * expected[1])


def test_synflow_is_conserved_through_every_hidden_unit() -> None:
    model, batches = two_linear_layers(), batches_of(2, shape=(3,), classes=2)
    scores = criteria.get("synflow")(model, batches, cross_entropy, sparsity=0.0, rounds=1)
    torch.testing.assert_close(scores["0.weight"].sum(1), scores["1.weight"].sum(0))


def test_synflow_in_one_round_keeps_the_strongest_paths() -> None:
    model, batches = two_linear_layers(), batches_of(2, shape=(3,), classes=2)
    scores = criteria.get("synflow")(model, batches, cross_entropy, sparsity=0.5, rounds=1)
    found = torch.cat([scores["0.weight"].flatten(), scores["1.weight"].flatten()]).float()
    sums = torch.cat([each.flatten() for each in path_sums(model[0].weight, model[1].weight)])
    kept = sums >= sums.sort(descending=True).values[9]
    torch.testing.assert_close(found[kept], power_of_two(found[kept], sums[kept]) * sums[kept])
    assert (found[~kept] < 0).all()


def test_synflow_removes_by_an_exponential_schedule() -> None:
    model, batches = mlp(8, 6, 2, bias=False), batches_of(2, shape=(8,), classes=2)
    assert sum(weight.numel() for weight in model.parameters()) == 48 + 12
    scores = criteria.get("synflow")(model, batches, cross_entropy, sparsity=0.875, rounds=3)
    flat = torch.cat([score.flatten() for score in scores.values()])
    # Of 60 weights 30 are alive after the first round, 15 after the second; an eighth is 7.5,
    # and halves are removed: 7.
    rounds = flat[flat < 0].unique(sorted=True, return_counts=True)[1].tolist()
    assert rounds == [30, 15, 8]
    assert (flat >= 0).sum() == 7


def synflow_by_matrices(weights: list[Tensor], sparsity: float, rounds: int) -> list[Tensor]:
    """Algorithm 1 of arXiv 2006.05467 for a chain of linear layers; returns the masks."""
    chosen = [torch.ones_like(weight) for weight in weights]
    for number in range(1, rounds + 1):
        alive = [weight.abs() * mask for weight, mask in zip(weights, chosen, strict=True)]
        ahead = [torch.ones(alive[0].shape[1]).double()]
        for weight in alive:
            ahead.append(weight @ ahead[-1])
        behind = [torch.ones(alive[-1].shape[0]).double()]
        for weight in reversed(alive):
            behind.append(weight.t() @ behind[-1])
        triples = zip(alive, ahead[:-1], behind[-2::-1], strict=True)
        scores = torch.cat([(w * torch.outer(out, into)).flatten() for w, into, out in triples])
        kept = round(scores.numel() * (1 - sparsity) ** (number / rounds))
        flat = torch.zeros_like(scores)
        flat[scores.argsort(descending=True)[:kept]] = 1
        parts = flat.split([weight.numel() for weight in weights])
        chosen = [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]
    return chosen


@pytest.mark.parametrize("rounds", [1, 2, 10])
def test_synflow_is_algorithm_1(rounds: int) -> None:
    model, batches = mlp(12, 10, 9, 7, bias=False), batches_of(2, shape=(12,), classes=7)
    weights = [weight.detach().double() for weight in model.parameters()]
    expected = synflow_by_matrices(weights, 0.8, rounds)
    scores = criteria.get("synflow")(model, batches, cross_entropy, sparsity=0.8, rounds=rounds)
    chosen = masks.from_scores(scores, 0.8)
    for mask, wanted in zip(chosen.values(), expected, strict=True):
        assert torch.equal(mask, wanted.bool())


def flow(chosen: dict[str, Tensor]) -> Tensor:
    """Return the number of paths from every input to every output that the masks leave."""
    paths = None
    for mask in chosen.values():
        paths = mask.double() if paths is None else mask.double() @ paths
    return paths


@pytest.mark.parametrize("sparsity", [0.99, 0.999])
def test_synflow_never_empties_a_layer(sparsity: float) -> None:
    model, batches = mlp(64, 100, 100, 100, 10), batches_of(2, shape=(64,), classes=10)
    scores = criteria.get("synflow")(model, batches, cross_entropy, sparsity=sparsity)
    chosen = masks.from_scores(scores, sparsity, min_per_layer=0)
    assert masks.kept(chosen) == 27_400 - round(27_400 * sparsity)
    assert masks.first_empty(chosen) is None
    assert flow(chosen).sum() > 0


def test_synflow_needs_a_round() -> None:
    with pytest.raises(UsageError, match="rounds must be at least 1"):
        batches = batches_of(1, shape=(2,), classes=2)
        criteria.get("synflow")(mlp(2, 2), batches, cross_entropy, sparsity=0.5, rounds=0)


# ERK


class Layers(nn.Module):
    """Layers that are never called: ERK looks at shapes only."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def erk_counts(model: nn.Module, sparsity: float, seed: int = 0) -> dict[str, int]:
    scores = criteria.get("erk")(model, [], cross_entropy, sparsity=sparsity, seed=seed)
    return {name: int((score > 0).sum()) for name, score in scores.items()}


def published(n_in: int, n_out: int, height: int | None = None, width: int | None = None) -> float:
    """Return the density of a layer up to the common factor, as in arXiv 1911.11134."""
    if height is None or width is None:
        return (n_in + n_out) / (n_in * n_out)
    return (n_in + n_out + height + width) / (n_in * n_out * height * width)


def test_erk_densities_are_the_published_ones() -> None:
    model = Layers(a=nn.Conv2d(8, 16, 3), b=nn.Conv2d(16, 32, (1, 5)), c=nn.Linear(128, 10))
    sizes = {"a.weight": 8 * 16 * 9, "b.weight": 16 * 32 * 5, "c.weight": 1280}
    raw = {
        "a.weight": published(8, 16, 3, 3),
        "b.weight": published(16, 32, 1, 5),
        "c.weight": published(128, 10),
    }
    factor = 499 / sum(raw[name] * size for name, size in sizes.items())
    counts = erk_counts(model, 0.9)
    assert sum(sizes.values()) == 4992
    assert sum(counts.values()) == 499
    for name, count in counts.items():
        assert abs(count - factor * raw[name] * sizes[name]) < 1


def test_erk_keeps_a_layer_whole_and_shares_what_it_leaves() -> None:
    model = Layers(small=nn.Conv2d(1, 4, 3), large=nn.Linear(100, 10))
    # Half of 1036 is 518; in proportion the small layer would get 518 * 11 / 121 = 47 of its 36.
    assert erk_counts(model, 0.5) == {"small.weight": 36, "large.weight": 482}


def test_erk_counts_inputs_per_group() -> None:
    model = Layers(depthwise=nn.Conv2d(8, 8, 3, groups=8), full=nn.Conv2d(8, 8, 3))
    # Shares 1 + 8 + 3 + 3 = 15 and 8 + 8 + 3 + 3 = 22 of 74 kept weights.
    assert erk_counts(model, 1 - 74 / 648) == {"depthwise.weight": 30, "full.weight": 44}


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.77, 0.95, 0.99])
def test_a_global_threshold_gives_the_erk_counts(sparsity: float) -> None:
    model = Layers(a=nn.Conv2d(3, 7, 3), b=nn.Linear(41, 13), c=nn.Conv1d(5, 4, 3))
    scores = criteria.get("erk")(model, [], cross_entropy, sparsity=sparsity)
    chosen = masks.from_scores(scores, sparsity)
    total = 189 + 533 + 60
    assert masks.kept(chosen) == total - math.floor(total * sparsity + 0.5)
    assert {name: int(mask.sum()) for name, mask in chosen.items()} == erk_counts(model, sparsity)


def test_erk_chooses_at_random_inside_a_layer() -> None:
    model = Layers(a=nn.Linear(100, 100))
    first, again, other = (
        criteria.get("erk")(model, [], cross_entropy, sparsity=0.9, seed=seed)["a.weight"]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    rows = (first > 0).sum(1)
    assert rows.sum() == 1000
    assert rows.max() < 30


# AutoS


@pytest.mark.parametrize("kind", features.KINDS)
def test_autos_scores_weight_and_initial_gradient(kind: str, tmp_path: Path) -> None:
    model = normed_net().float()
    pixels, labels = batches_of(8, shape=(3,), classes=2)[0]
    torch.manual_seed(1)
    network = AutoS(kind, [6])
    network.save(tmp_path / "autos.safetensors")
    trained = copy.deepcopy(model).train()
    cross_entropy(trained(pixels), labels).backward()
    weights = zoo.prunable(model)
    gradients = {name: trained.get_parameter(name).grad for name in weights}
    contexts = features.contexts(weights, gradients)
    path = str(tmp_path / "autos.safetensors")
    scores = criteria.get("autos")(
        model.eval(), [(pixels, labels)], cross_entropy, scorer=path, sparsity=0.5
    )
    for name, weight in weights.items():
        pieces = features.layer_features(kind, weight, gradients[name], contexts[name])
        expected = network(torch.cat(list(pieces), dim=1).t()).view_as(weight)
        torch.testing.assert_close(scores[name], expected.detach(), rtol=1e-4, atol=1e-5)


def test_autos_takes_the_environments_scorer(scorer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = mlp(5, 7, 3), batches_of(8, shape=(5,), classes=3)
    named = criteria.get("autos")(model, batches, cross_entropy, scorer=scorer, sparsity=0.5)
    monkeypatch.setenv("AUTOSPARSE_SCORER", scorer)
    found = criteria.get("autos")(model, batches, cross_entropy, sparsity=0.5)
    assert all(torch.equal(found[name], named[name]) for name in named)


def test_autos_without_a_file(tmp_path: Path) -> None:
    batches = batches_of(8, shape=(5,), classes=3)
    missing = str(tmp_path / "nothing.safetensors")
    with pytest.raises(UsageError, match=r"no AutoS file at .*nothing\.safetensors"):
        criteria.get("autos")(mlp(5, 7, 3), batches, cross_entropy, scorer=missing, sparsity=0.5)


def test_autos_says_what_its_scores_depend_on(scorer: str) -> None:
    found = criteria.get("autos").provenance(scorer=scorer)
    assert found == {"autos": AutoS.load(scorer).fingerprint, "corpus": "0123456789abcdef"}


def test_a_file_that_is_written_again_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "autos.safetensors"
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        network = AutoS("context")
        network.save(path)
        os.utime(path, ns=(seed, seed))
        found.append(criteria.get("autos").provenance(scorer=str(path))["autos"])
        assert found[-1] == network.fingerprint
    assert found[0] != found[1]


@pytest.mark.parametrize("name", ["random", "erk"])
def test_draws_do_not_depend_on_the_default_device(name: str) -> None:
    model = mlp(4, 3, 2)
    given = {"sparsity": 0.5} if name == "erk" else {}
    expected = criteria.get(name)(model, [], cross_entropy, **given)
    with torch.device("meta"):
        found = criteria.get(name)(model, [], cross_entropy, **given)
    assert all(torch.equal(score, expected[key]) for key, score in found.items())
