"""Live paths by hand and by brute force; choosing weights that lie on them."""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Callable, Sequence
from itertools import pairwise, product

import pytest
import torch
from timm.layers import RmsNorm
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autosparse.models import zoo
from autosparse.models.config import ModelConfig
from autosparse.sparsity import masks, reach
from autosparse.sparsity.paths import image_shape
from tests.conftest import few, make_model

pytestmark = pytest.mark.usefixtures("one_thread")


def ones_for(model: nn.Module, **changed: list) -> dict[str, Tensor]:
    """Return masks that keep everything but what `changed` says (names with _ for the dots)."""
    found = {}
    for name, weight in zoo.prunable(model).items():
        rows = changed.pop(name.replace(".", "_").removeprefix("_"), None)
        mask = torch.ones(weight.shape) if rows is None else torch.tensor(rows)
        found[name] = mask.bool().view(weight.shape)
    assert not changed
    return found


class Named(nn.Module):
    """Layers by name, and a forward made of them."""

    def __init__(self, forward: Callable, **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = forward

    def forward(self, images: Tensor) -> Tensor:
        return self.run(self, images)


def chain(*widths: int, bias: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


# Live, by hand


@pytest.mark.parametrize("bias", [False, True])
def test_a_chain_with_cut_paths(bias: bool) -> None:
    """Unit 0 carries; 1 goes nowhere; 2 goes nowhere, too; 3 is fed by nothing."""
    model = chain(2, 4, 2, bias=bias)
    chosen = {
        "1.weight": torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]]).bool(),
        "3.weight": torch.tensor([[1, 0, 0, 1], [0, 0, 0, 1]]).bool(),
    }
    found = reach.live(model, chosen, (2, 1, 1))
    assert found["1.weight"].int().tolist() == [[1, 0], [0, 0], [0, 0], [0, 0]]
    assert found["3.weight"].int().tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("norm", "into", "out_of"),
    [
        (nn.BatchNorm1d(4), [1, 0, 0, 0], [1, 0, 0, 0]),
        (nn.LayerNorm(4), [1, 1, 0, 0], [1, 0, 1, 0]),
        (nn.GroupNorm(2, 4), [1, 1, 0, 0], [1, 0, 0, 0]),
        (RmsNorm(4), [1, 1, 0, 0], [1, 0, 0, 0]),
    ],
)
def test_a_norm_over_channels_lets_them_hear_of_each_other(norm, into, out_of) -> None:
    """Unit 0 carries, 1 goes nowhere, 2 is fed by nothing and read, 3 neither.

    A layer norm scales unit 0 by what 1 says, and takes from 2 the mean of all; in two groups,
    2 does not hear of 0 and 1. Without a mean that is taken away, what is fed by nothing stays
    zero.
    """
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 4), norm, nn.Linear(4, 2))
    chosen = {
        "1.weight": torch.tensor([[1, 0], [0, 1], [0, 0], [0, 0]]).bool(),
        "3.weight": torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]]).bool(),
    }
    found = reach.live(model, chosen, (2, 1, 1))
    assert found["1.weight"].any(1).int().tolist() == into
    assert found["3.weight"].any(0).int().tolist() == out_of


@pytest.mark.parametrize("name", ["test_efficientnet_ln", "test_efficientnet_gn", "test_mambaout"])
def test_what_is_dead_behind_norms_over_channels_has_no_gradient(name: str) -> None:
    """In the network as it is, without biases: there no unit says anything unless it is fed."""
    model = make_model(name).eval()
    generator = torch.Generator().manual_seed(2)
    weights = zoo.prunable(model)
    scores = {name: torch.rand(each.shape, generator=generator) for name, each in weights.items()}
    chosen = masks.keep_counts(scores, {n: -(-each.numel() // 50) for n, each in scores.items()})
    shape = image_shape(model)
    found = reach.live(model, chosen, shape)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name in weights:
                parameter.mul_(chosen[parameter_name])
            elif parameter_name.endswith("bias"):
                parameter.zero_()
    images = torch.rand(2, *shape, generator=generator)
    model(images).square().sum().backward()
    dead = {name: mask & ~found[name] for name, mask in chosen.items()}
    assert masks.kept(dead)
    for parameter_name, mask in dead.items():
        gradient = weights[parameter_name].grad
        assert gradient is None or not gradient[mask].any()


def test_dead_weights_are_exchanged_by_hand() -> None:
    """The weight into unit 1 and the one out of unit 2 make room for what meets unit 0.

    The highest scores, of the weight into unit 2 and of that out of unit 1, would have met the two
    that go.
    """
    model = chain(2, 3, 2)
    chosen = {
        "1.weight": torch.tensor([[1, 0], [0, 1], [0, 0]]).bool(),
        "3.weight": torch.tensor([[1, 0, 0], [0, 0, 1]]).bool(),
    }
    scores = {
        "1.weight": torch.tensor([[5, 1], [0, 4], [9, 9]]).float(),
        "3.weight": torch.tensor([[5, 9, 0], [2, 9, 4]]).float(),
    }
    found = reach.onto_paths(model, chosen, scores, (2, 1, 1))
    assert found["1.weight"].int().tolist() == [[1, 1], [0, 0], [0, 0]]
    assert found["3.weight"].int().tolist() == [[1, 0, 0], [1, 0, 0]]


def test_where_nothing_is_in_reach_the_best_dead_weights_stay() -> None:
    """One input, one output, three units: unit 0 carries and has no more weights to offer."""
    model = chain(1, 3, 1)
    chosen = {"1.weight": torch.tensor([[1], [1], [0]]).bool(),
              "3.weight": torch.tensor([[1, 0, 1]]).bool()}  # fmt: skip
    scores = {name: torch.rand(mask.shape) for name, mask in chosen.items()}
    found = reach.onto_paths(model, chosen, scores, (1, 1, 1))
    assert all(torch.equal(found[name], mask) for name, mask in chosen.items())
    cut = {**chosen, "3.weight": torch.zeros(1, 3).bool()}
    found = reach.onto_paths(model, cut, scores, (1, 1, 1))
    assert all(torch.equal(found[name], mask) for name, mask in cut.items())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_mambaout"])
def test_exchanged_weights_are_live_and_no_layer_changes_its_count(name: str) -> None:
    model = make_model(name)
    generator = torch.Generator().manual_seed(1)
    weights = zoo.prunable(model)
    scores = {name: torch.rand(each.shape, generator=generator) for name, each in weights.items()}
    chosen = masks.keep_counts(scores, {name: each.numel() // 10 for name, each in scores.items()})
    shape = image_shape(model)
    found = reach.onto_paths(model, chosen, scores, shape)
    before, after = (reach.live(model, each, shape) for each in (chosen, found))
    for name, mask in found.items():
        assert mask.count_nonzero() == chosen[name].count_nonzero()
        assert not (mask & ~chosen[name] & ~after[name]).any()
        assert not (before[name] & ~after[name]).any()
    assert masks.kept(after) > masks.kept(before)


def test_everything_is_live_in_a_dense_chain() -> None:
    model = chain(3, 5, 4, 2, bias=True)
    chosen = ones_for(model)
    found = reach.live(model, chosen, (3, 1, 1))
    assert all(torch.equal(found[name], mask) for name, mask in chosen.items())


def test_an_empty_layer_cuts_a_chain_and_not_a_branch() -> None:
    model = chain(3, 5, 4, 2)
    chosen = {**ones_for(model), "3.weight": torch.zeros(4, 5).bool()}
    assert masks.kept(reach.live(model, chosen, (3, 1, 1))) == 0

    residual = Named(
        lambda net, x: net.last(net.first(x.flatten(1)) + net.b(net.a(net.first(x.flatten(1))))),
        first=nn.Linear(3, 4), a=nn.Linear(4, 5), b=nn.Linear(5, 4), last=nn.Linear(4, 2),
    )  # fmt: skip
    chosen = {**ones_for(residual), "b.weight": torch.zeros(4, 5).bool()}
    found = reach.live(residual, chosen, (3, 1, 1))
    assert {name: int(mask.sum()) for name, mask in found.items()} == {
        "first.weight": 12, "a.weight": 0, "b.weight": 0, "last.weight": 8,
    }  # fmt: skip


def test_a_residual_branch_by_hand() -> None:
    """Units 0 and 1; the branch goes from unit 0 to unit 1, the output sees unit 1 alone."""
    model = Named(
        lambda net, x: net.head((y := net.stem(x.flatten(1))) + net.branch(y)),
        stem=nn.Linear(2, 2), branch=nn.Linear(2, 2), head=nn.Linear(2, 1),
    )  # fmt: skip
    chosen = ones_for(
        model, stem_weight=[[1, 1], [0, 0]], branch_weight=[[1, 1], [1, 0]], head_weight=[[0, 1]]
    )
    found = reach.live(model, chosen, (2, 1, 1))
    assert found["stem.weight"].int().tolist() == [[1, 1], [0, 0]]
    assert found["branch.weight"].int().tolist() == [[0, 0], [1, 0]]
    assert found["head.weight"].int().tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("side", "stride", "live"),
    [
        pytest.param(1, 1, [[0, 0, 0], [0, 1, 0], [0, 0, 0]], id="one pixel: the centre"),
        pytest.param(2, 1, [[1, 1, 1], [1, 1, 1], [1, 1, 1]], id="two pixels: all"),
        pytest.param(2, 2, [[0, 0, 0], [0, 1, 1], [0, 1, 1]], id="one window over two pixels"),
        pytest.param(3, 2, [[1, 1, 1], [1, 1, 1], [1, 1, 1]], id="windows at both ends"),
    ],
)
def test_kernel_places_that_see_padding_only_are_dead(
    side: int, stride: int, live: list[list[int]]
) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, stride, padding=1), nn.BatchNorm2d(3), nn.ReLU())
    found = reach.live(model, ones_for(model), (2, side, side))["0.weight"]
    assert torch.equal(found.int(), torch.tensor(live).int().expand(3, 2, 3, 3))


def test_masked_places_of_a_kernel_by_hand() -> None:
    """Two pixels in a row, [1, 3] kernels without padding on the second: what meets what."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, (1, 3), padding=(0, 1), bias=False),
        nn.Conv2d(2, 1, (1, 2), bias=False),
    )
    chosen = {
        "0.weight": torch.tensor([[[[1, 0, 0]]], [[[0, 0, 1]]]]).bool(),
        "1.weight": torch.tensor([[[[1, 0]], [[1, 1]]]]).bool(),
    }
    # Channel 0 sees the pixel to its left, so its left end is empty: the weight on it is dead.
    # Channel 1 sees the pixel to its right: its left end is fed, its right end is empty.
    found = reach.live(model, chosen, (1, 1, 2))
    assert found["0.weight"].flatten().int().tolist() == [0, 0, 0, 0, 0, 1]
    assert found["1.weight"].flatten().int().tolist() == [0, 0, 1, 0]


def test_depthwise_and_grouped_convolutions_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1, bias=False),
        nn.Conv2d(4, 4, 1, groups=4, bias=False),
        nn.Conv2d(4, 2, 1, groups=2, bias=False),
    )
    chosen = {
        "0.weight": torch.tensor([[1, 1], [1, 1], [1, 0], [0, 0]]).bool().view(4, 2, 1, 1),
        "1.weight": torch.tensor([1, 0, 1, 1]).bool().view(4, 1, 1, 1),
        "2.weight": torch.tensor([[0, 1], [1, 1]]).bool().view(2, 2, 1, 1),
    }
    # Output 0 takes only channel 1, which the depthwise layer cut; output 1 takes 2 and the
    # unfed 3.
    found = reach.live(model, chosen, (2, 4, 4))
    assert found["0.weight"].view(4, 2).int().tolist() == [[0, 0], [0, 0], [1, 0], [0, 0]]
    assert found["1.weight"].flatten().int().tolist() == [0, 0, 1, 0]
    assert found["2.weight"].view(2, 2).int().tolist() == [[0, 0], [1, 0]]


def test_attention_that_is_fed_by_nothing_is_dead() -> None:
    model = Named(
        lambda net, x: net.head(net.mix(*[net.embed(x.flatten(2).transpose(1, 2))] * 3)[0].mean(1)),
        embed=nn.Linear(3, 8), mix=nn.MultiheadAttention(8, 2, batch_first=True),
        head=nn.Linear(8, 2),
    )  # fmt: skip
    whole = ones_for(model)
    assert masks.kept(reach.live(model, whole, (3, 2, 2))) == masks.kept(whole)
    cut = {**whole, "embed.weight": torch.zeros(8, 3).bool()}
    assert masks.kept(reach.live(model, cut, (3, 2, 2))) == 0


def test_negative_weights_norms_and_activations_do_not_matter() -> None:
    """Only what is kept: a network whose units are all shut by its real weights."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
    )
    with torch.no_grad():
        model[0].weight.fill_(-1)
        model[0].bias.fill_(-9)
        model[1].weight.zero_()
        model[4].weight.zero_()
    found = reach.live(model, ones_for(model), (1, 4, 4))
    assert masks.kept(found) == 27 + 24


def test_model_masks_and_rng_are_left_as_they_were() -> None:
    model = make_model("test_nfnet").train()
    chosen = ones_for(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    rng = torch.get_rng_state()
    first = reach.live(model, chosen, (1, 16, 16))
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training and "forward" not in vars(model.stem.conv1)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert all(mask.all() for mask in chosen.values())
    again = reach.live(model, chosen, (1, 16, 16))
    assert all(torch.equal(first[name], again[name]) for name in first)


# Live, against brute force


def reachable(layers: Sequence[Tensor]) -> list[Tensor]:
    """Walk every edge of a chain of masks [out, in] forwards and backwards."""
    forwards = [{*range(layers[0].shape[1])}]
    for layer in layers:
        edges = layer.nonzero().tolist()
        forwards.append({out for out, into in edges if into in forwards[-1]})
    backwards = [{*range(layers[-1].shape[0])}]
    for layer in reversed(layers):
        edges = layer.nonzero().tolist()
        backwards.append({into for out, into in edges if out in backwards[-1]})
    found = []
    for number, layer in enumerate(layers):
        mask = torch.zeros_like(layer)
        for out, into in layer.nonzero().tolist():
            mask[out, into] = into in forwards[number] and out in backwards[-number - 2]
        found.append(mask)
    return found


@pytest.mark.parametrize("density", [0.1, 0.2, 0.35, 0.6])
@pytest.mark.parametrize("seed", range(4))
def test_random_masks_of_a_perceptron(seed: int, density: float) -> None:
    model = chain(5, 7, 4, 6, 3)
    generator = torch.Generator().manual_seed(seed)
    chosen = {
        name: torch.rand(weight.shape, generator=generator) < density
        for name, weight in zoo.prunable(model).items()
    }
    expected = reachable(list(chosen.values()))
    found = reach.live(model, chosen, (5, 1, 1))
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected, strict=True))


def test_random_masks_include_live_and_dead_ones() -> None:
    """What the test above rests on."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (4, 7), (6, 4), (3, 6)]
    chosen = [torch.rand(shape, generator=generator) < 0.35 for shape in shapes]
    kept, live = (sum(int(mask.sum()) for mask in each) for each in (chosen, reachable(chosen)))
    assert 0.3 * kept < live < 0.9 * kept


def unrolled(mask: Tensor, height: int, width: int, stride: int) -> list[tuple]:
    """Return the edges of a 3x3 convolution with padding 1: (input unit, output unit, weight)."""
    edges = []
    for out, into, y, x in mask.nonzero().tolist():
        for top, left in product(range(0, height, stride), range(0, width, stride)):
            row, column = top + y - 1, left + x - 1
            if 0 <= row < height and 0 <= column < width:
                to = (out, top // stride, left // stride)
                edges.append(((into, row, column), to, (out, into, y, x)))
    return edges


@pytest.mark.parametrize("seed", range(6))
def test_random_masks_of_a_convolutional_network(seed: int) -> None:
    """Every unit of every channel is a node, on a 3x2 image; the second layer has stride 2."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, 2, padding=1), nn.ReLU(),
        nn.Conv2d(3, 2, 3, padding=1),
    )  # fmt: skip
    draw, sizes = random.Random(seed), [(3, 2, 1), (3, 2, 2), (2, 1, 1)]
    chosen = {
        name: torch.tensor([draw.random() < 0.15 for _ in range(weight.numel())]).view(weight.shape)
        for name, weight in zoo.prunable(model).items()
    }
    edges = [unrolled(mask, *size) for mask, size in zip(chosen.values(), sizes, strict=True)]
    fed = [{(0, y, x) for y in range(3) for x in range(2)}]
    for layer in edges:
        fed.append({to for start, to, _ in layer if start in fed[-1]})
    heard = [{(channel, y, 0) for channel in range(2) for y in range(2)}]
    for layer in reversed(edges):
        heard.append({start for start, to, _ in layer if to in heard[-1]})
    heard.reverse()
    found = reach.live(model, chosen, (1, 3, 2))
    for number, (name, layer) in enumerate(zip(chosen, edges, strict=True)):
        expected = torch.zeros_like(chosen[name])
        for start, to, weight in layer:
            if start in fed[number] and to in heard[number + 1]:
                expected[weight] = True
        assert torch.equal(found[name], expected), name


# Live, where the signal is not that of a plain network


def test_gates_of_a_deep_network_are_live() -> None:
    """Twelve residual blocks, the last with a gate as in squeeze-and-excitation."""
    model = deep_with_gate(12)
    found = reach.live(model, ones_for(model), (4, 4, 4))
    assert found["gate.weight"].all()


def deep_with_gate(blocks: int) -> nn.Module:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        for number in range(blocks):
            x = x + net.get_submodule(f"block{number}")(x)
        x = x * net.squash(net.gate(x.mean((2, 3), keepdim=True)))
        return net.head(x.mean((2, 3)))

    layers = {f"block{number}": nn.Conv2d(4, 4, 1) for number in range(blocks)}
    gate = {"gate": nn.Conv2d(4, 4, 1), "squash": nn.Sigmoid(), "head": nn.Linear(4, 2)}
    return Named(forward, **layers, **gate)


def test_queries_and_keys_of_a_deep_transformer_are_live() -> None:
    config = ModelConfig("test_vit", {"patch_size": 8, "depth": 12})
    model = zoo.create(config, num_classes=4, in_chans=3, image_size=32, seed=0)
    chosen = ones_for(model)
    assert masks.kept(reach.live(model, chosen, (3, 32, 32))) == masks.kept(chosen)


def test_a_branch_whose_gain_starts_at_zero_is_live() -> None:
    """NFNet's skipinit: the gain is trained, so the branch is no dead one."""
    model = Named(
        lambda net, x: net.head(x.flatten(1) + net.gain * net.branch(x.flatten(1))),
        branch=nn.Linear(3, 3), head=nn.Linear(3, 2),
    )  # fmt: skip
    model.gain = nn.Parameter(torch.zeros(()))
    found = reach.live(model, ones_for(model), (3, 1, 1))
    assert found["branch.weight"].all()


def subtracted_in_place(one: Tensor, other: Tensor) -> Tensor:
    found = one.clone()
    found -= other
    return found


@pytest.mark.parametrize("take", [operator.sub, torch.sub, torch.subtract, subtracted_in_place])
def test_what_is_beside_a_branch_that_is_a_difference_is_live(take: Callable) -> None:
    """x + gain * (f(x) - x) without f is (1 - gain) * x, whatever a signal is rescaled by.

    EfficientViM and FastViT have such branches, behind a module of their own.
    """
    model = Named(
        lambda net, x: net.head(
            (y := net.stem(x.flatten(1))) + net.drop(net.gain * take(net.branch(y), y))
        ),
        stem=nn.Linear(3, 1), branch=nn.Linear(1, 1), head=nn.Linear(1, 2), drop=nn.Identity(),
    )  # fmt: skip
    model.gain = nn.Parameter(torch.tensor(0.5))
    found = reach.live(model, ones_for(model, branch_weight=[[0]]), (3, 1, 1))
    assert {name: int(mask.sum()) for name, mask in found.items()} == {
        "stem.weight": 3, "branch.weight": 0, "head.weight": 2,
    }  # fmt: skip


def test_coordinates_are_subtracted_as_they_are() -> None:
    """Positions relative to each other, from numbers of floats, look something up."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        places = torch.arange(3.0)
        apart = (places[:, None] - places + 2).long()
        return net.head(net.stem(x.flatten(1)) + torch.ones(5)[apart].sum())

    model = Named(forward, stem=nn.Linear(3, 2), head=nn.Linear(2, 2))
    assert masks.kept(reach.live(model, ones_for(model), (3, 1, 1))) == 10


def test_a_head_that_is_not_pruned_may_be_zero() -> None:
    """Excluded from pruning, and at zero to start with, as timm's mixers have it."""
    model = chain(3, 4, 2)
    with torch.no_grad():
        model[3].weight.zero_()
    found = reach.live(model, {"1.weight": torch.ones(4, 3).bool()}, (3, 1, 1))
    assert found["1.weight"].all()


def test_positions_are_no_input() -> None:
    """With its patches cut off, what a transformer says is a constant."""
    config = ModelConfig("test_vit", {"patch_size": 8})
    model = zoo.create(config, num_classes=4, in_chans=3, image_size=32, seed=0)
    chosen = ones_for(model)
    chosen["patch_embed.proj.weight"][:] = False
    assert masks.kept(reach.live(model, chosen, (3, 32, 32))) == 0


def test_live_may_be_asked_for_without_gradients() -> None:
    model = chain(3, 4, 2)
    with torch.no_grad():
        found = reach.live(model, ones_for(model), (3, 1, 1))
    assert masks.kept(found) == 20


# The shape of an image


# Thinning


def test_thinned_layers_keep_paths_by_hand() -> None:
    """Six units; the first layer's best lead to units 0 and 1, the second's come from 4 and 5.

    In three rounds from 6 to 4, 3 and 2: {0 1 2 3} and {2 3 4 5}; then 2 and 3, which carry, with
    the best dead one each; then 2 and 3.
    """
    model = chain(1, 6, 1)
    falling = torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    scores = {"1.weight": falling.T, "3.weight": falling.flip(1)}
    counts = dict.fromkeys(scores, 2)
    best = masks.keep_counts(scores, counts)
    assert masks.kept(reach.live(model, best, (1, 1, 1))) == 0
    found = reach.thinned(model, scores, counts, (1, 1, 1), rounds=3)
    assert [each.flatten().int().tolist() for each in found.values()] == [[0, 0, 1, 1, 0, 0]] * 2


@pytest.mark.parametrize(
    ("name", "tilt"),
    few(
        [("test_resnet", 0.0), ("test_vit", 1.0), ("test_efficientnet", 1.0), ("test_mambaout", 0)],
        [("test_resnet", 0.0), ("test_efficientnet", 1.0)],
    ),
)
def test_thinned_networks_have_their_counts_and_carry(name: str, tilt: float) -> None:
    """At 2 % a random choice of as many has far fewer on a path."""
    model = make_model(name)
    generator = torch.Generator().manual_seed(1)
    weights = zoo.prunable(model)
    scores = {name: torch.rand(each.shape, generator=generator) for name, each in weights.items()}
    counts = {name: max(each.numel() // 50, 2) for name, each in scores.items()}
    shape = image_shape(model)
    found = reach.thinned(model, scores, counts, shape, tilt=tilt)
    assert {name: int(mask.count_nonzero()) for name, mask in found.items()} == counts
    by_chance = reach.live(model, masks.keep_counts(scores, counts), shape)
    carried = masks.kept(reach.live(model, found, shape)) / masks.kept(found)
    assert carried > max(0.6, masks.kept(by_chance) / masks.kept(found))
    again = reach.thinned(model, scores, counts, shape, tilt=tilt)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_networks_are_thinned_by_smaller_images_where_they_take_them(monkeypatch) -> None:
    """A convolutional one gives the masks of images of that size; a perceptron takes one only."""
    seen = []
    monkeypatch.setattr(reach, "SIDE", 8)
    make = reach.PathNetwork

    def noting(model, masks_, shape, dtype):
        seen.append(shape)
        return make(model, masks_, shape, dtype)

    monkeypatch.setattr(reach, "PathNetwork", noting)
    for model, sizes in ((make_model("test_resnet"), [8]), (chain(256, 9, 2), [8, 16])):
        scores = {n: torch.rand(each.shape) for n, each in zoo.prunable(model).items()}
        counts = {n: max(each.numel() // 10, 1) for n, each in scores.items()}
        found = reach.thinned(model, scores, counts, (1, 16, 16), rounds=2)
        assert [shape[-1] for shape in seen] == sizes
        if sizes == [8]:
            small = reach.thinned(model, scores, counts, (1, 8, 8), rounds=2)
            assert all(torch.equal(found[n], small[n]) for n in found)
        seen.clear()


def test_channels_last_makes_no_difference() -> None:
    generator = torch.Generator().manual_seed(1)
    model = make_model("test_resnet")
    scores = {n: torch.rand(w.shape, generator=generator) for n, w in zoo.prunable(model).items()}
    counts = {name: each.numel() // 10 for name, each in scores.items()}
    usual = reach.thinned(model, scores, counts, (1, 16, 16), rounds=2)
    model.to(memory_format=torch.channels_last)
    found = reach.thinned(model, scores, counts, (1, 16, 16), rounds=2)
    # Paths are sums in float32, here in another order: a near tie may go the other way.
    same = sum(int((found[name] & usual[name]).sum()) for name in found)
    assert same >= 0.999 * masks.kept(usual)


def test_thinning_stays_within_the_masks_it_is_given() -> None:
    model = chain(3, 8, 8, 2)
    generator = torch.Generator().manual_seed(0)
    scores = {n: torch.rand(w.shape, generator=generator) for n, w in zoo.prunable(model).items()}
    within = masks.keep(scores, 60)
    counts = {name: int(mask.count_nonzero()) // 2 for name, mask in within.items()}
    found = reach.thinned(model, scores, counts, (3, 1, 1), within=within)
    assert all((mask <= within[name]).all() for name, mask in found.items())
    assert {name: int(mask.count_nonzero()) for name, mask in found.items()} == counts


def test_what_lies_on_more_paths_is_kept_rather_the_higher_the_tilt() -> None:
    """Unit 0 of a hidden layer is read by all of the next, unit 1 by one: three paths against one.

    With equal scores a tilt alone decides; without it the first position would.
    """
    model = chain(1, 2, 3, 1)
    within = {**ones_for(model), "3.weight": torch.tensor([[1, 0], [1, 0], [1, 1]]).bool().flip(1)}
    scores = {name: torch.zeros(mask.shape) for name, mask in within.items()}
    counts = {"1.weight": 1, "3.weight": 4, "5.weight": 3}
    kept = [
        reach.thinned(model, scores, counts, (1, 1, 1), within=within, tilt=tilt, rounds=1)
        for tilt in (0.0, 5.0)
    ]
    assert [each["1.weight"].flatten().int().tolist() for each in kept] == [[1, 0], [0, 1]]


# Thinning on a device that is not to be waited for


class Waits(TorchDispatchMode):
    """Counts what a GPU would have to be waited for: values that Python asks for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_pass_through_the_network_asks_for_no_value() -> None:
    model = make_model("test_resnet")
    network = reach.PathNetwork(model, ones_for(model), (1, 16, 16), torch.float32)
    network.gradients()  # The first pass asks whether the sum over paths is finite.
    with Waits() as waits:
        network.gradients()
        network.gradients(image=1)
    assert waits.count == 0


@pytest.mark.parametrize("tilt", [0.0, 1.0])
def test_layers_thinned_together_are_those_thinned_one_by_one(tilt: float) -> None:
    """As on a GPU, which nothing waits for. With ties, dead weights, and a layer without a path."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (30, 20), "b": (500,), "none": (40,), "dead": (7, 7)}
    scores = {n: (torch.rand(s, generator=generator) * 50).round() for n, s in shapes.items()}
    begun = {n: torch.rand(s, generator=generator) < 0.9 for n, s in shapes.items()}
    counts = {"a": 3, "b": 250, "none": 0, "dead": 5}
    one, other = ({n: begun[n].float() for n in shapes} for _ in range(2))
    apart = [reach._Layer(n, one[n], begun[n], scores[n], counts[n]) for n in shapes]
    together = [reach._Layers(part, begun, scores, counts) for part in reach._cut(other, most=700)]
    assert [list(part.weights) for part in together] == [["a"], ["b", "none", "dead"]]
    for done in (0.25, 0.5, 1.0):
        sums = {n: (torch.rand(s, generator=generator) * 3).floor() for n, s in shapes.items()}
        sums["dead"].zero_()
        sums["b"][:9] = torch.nan
        for layer in apart:
            layer.thin(dict(sums), done, tilt)
        with Waits() as waits:
            for part in together:
                part.thin(dict(sums), done, tilt)
        assert waits.count == 0
    for part in (*apart, *together):
        for name, mask in part.masks().items():
            assert int(mask.sum()) == counts[name]
            assert torch.equal(mask, one[name] != 0)
            assert torch.equal(mask, other[name] != 0)


def test_thinned_masks_are_those_of_before() -> None:
    """The fingerprint that earlier versions gave: tickets that were made are made again."""
    model = make_model("test_resnet")
    generator = torch.Generator().manual_seed(1)
    weights = zoo.prunable(model).items()
    scores = {name: torch.rand(each.shape, generator=generator) for name, each in weights}
    counts = {name: max(each.numel() // 50, 2) for name, each in scores.items()}
    found = reach.thinned(model, scores, counts, (1, 16, 16))
    assert masks.fingerprint(found) == "c2e1d0867b58f45f"


def test_what_is_on_no_path_is_rated_last() -> None:
    """What is on no path comes last, in its order; where nothing is on one, scores decide."""
    score, paths = torch.tensor([1.0, 5.0, 3.0, 4.0]), torch.tensor([2.0, 0.0, 1.0, 0.0])
    found = reach._rated(score, paths.clone(), 1.0)
    lifted = [1 + math.log(2), 3.0]
    worst = min(lifted) - 1
    assert found.tolist() == pytest.approx([lifted[0], worst, lifted[1], worst - 1])
    none = reach._rated(score, torch.zeros(4), 0.0)
    assert none.tolist() == score.tolist()
    assert len(reach._rated(score[:0], paths[:0], 1.0)) == 0
