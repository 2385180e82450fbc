"""Live paths by hand and by brute force; the network as a sum over paths; rescaling."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from itertools import pairwise, product

import pytest
import timm
import torch
from timm.layers import RmsNorm
from torch import Tensor, nn

from autosparse import masks, models, paths
from autosparse.config import ModelConfig
from autosparse.errors import UsageError
from tests.conftest import make_model

pytestmark = pytest.mark.usefixtures("one_thread")


def ones_for(model: nn.Module, **changed: list) -> dict[str, Tensor]:
    """Return masks that keep everything but what `changed` says (names with _ for the dots)."""
    found = {}
    for name, weight in models.prunable(model).items():
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
    found = paths.live(model, chosen, (2, 1, 1))
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
    found = paths.live(model, chosen, (2, 1, 1))
    assert found["1.weight"].any(1).int().tolist() == into
    assert found["3.weight"].any(0).int().tolist() == out_of


@pytest.mark.parametrize("name", ["test_efficientnet_ln", "test_efficientnet_gn", "test_mambaout"])
def test_what_is_dead_behind_norms_over_channels_has_no_gradient(name: str) -> None:
    """In the network as it is, without biases: there no unit says anything unless it is fed."""
    model = make_model(name).eval()
    generator = torch.Generator().manual_seed(2)
    weights = models.prunable(model)
    scores = {name: torch.rand(each.shape, generator=generator) for name, each in weights.items()}
    chosen = masks.keep_counts(scores, {n: -(-each.numel() // 50) for n, each in scores.items()})
    shape = paths.image_shape(model)
    found = paths.live(model, chosen, shape)
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
    found = paths.onto_paths(model, chosen, scores, (2, 1, 1))
    assert found["1.weight"].int().tolist() == [[1, 1], [0, 0], [0, 0]]
    assert found["3.weight"].int().tolist() == [[1, 0, 0], [1, 0, 0]]


def test_where_nothing_is_in_reach_the_best_dead_weights_stay() -> None:
    """One input, one output, three units: unit 0 carries and has no more weights to offer."""
    model = chain(1, 3, 1)
    chosen = {"1.weight": torch.tensor([[1], [1], [0]]).bool(),
              "3.weight": torch.tensor([[1, 0, 1]]).bool()}  # fmt: skip
    scores = {name: torch.rand(mask.shape) for name, mask in chosen.items()}
    found = paths.onto_paths(model, chosen, scores, (1, 1, 1))
    assert all(torch.equal(found[name], mask) for name, mask in chosen.items())
    cut = {**chosen, "3.weight": torch.zeros(1, 3).bool()}
    found = paths.onto_paths(model, cut, scores, (1, 1, 1))
    assert all(torch.equal(found[name], mask) for name, mask in cut.items())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_mambaout"])
def test_exchanged_weights_are_live_and_no_layer_changes_its_count(name: str) -> None:
    model = make_model(name)
    generator = torch.Generator().manual_seed(1)
    weights = models.prunable(model)
    scores = {name: torch.rand(each.shape, generator=generator) for name, each in weights.items()}
    chosen = masks.keep_counts(scores, {name: each.numel() // 10 for name, each in scores.items()})
    shape = paths.image_shape(model)
    found = paths.onto_paths(model, chosen, scores, shape)
    before, after = (paths.live(model, each, shape) for each in (chosen, found))
    for name, mask in found.items():
        assert mask.count_nonzero() == chosen[name].count_nonzero()
        assert not (mask & ~chosen[name] & ~after[name]).any()
        assert not (before[name] & ~after[name]).any()
    assert masks.kept(after) > masks.kept(before)


def test_everything_is_live_in_a_dense_chain() -> None:
    model = chain(3, 5, 4, 2, bias=True)
    chosen = ones_for(model)
    found = paths.live(model, chosen, (3, 1, 1))
    assert all(torch.equal(found[name], mask) for name, mask in chosen.items())


def test_an_empty_layer_cuts_a_chain_and_not_a_branch() -> None:
    model = chain(3, 5, 4, 2)
    chosen = {**ones_for(model), "3.weight": torch.zeros(4, 5).bool()}
    assert masks.kept(paths.live(model, chosen, (3, 1, 1))) == 0

    residual = Named(
        lambda net, x: net.last(net.first(x.flatten(1)) + net.b(net.a(net.first(x.flatten(1))))),
        first=nn.Linear(3, 4), a=nn.Linear(4, 5), b=nn.Linear(5, 4), last=nn.Linear(4, 2),
    )  # fmt: skip
    chosen = {**ones_for(residual), "b.weight": torch.zeros(4, 5).bool()}
    found = paths.live(residual, chosen, (3, 1, 1))
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
    found = paths.live(model, chosen, (2, 1, 1))
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
    found = paths.live(model, ones_for(model), (2, side, side))["0.weight"]
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
    found = paths.live(model, chosen, (1, 1, 2))
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
    found = paths.live(model, chosen, (2, 4, 4))
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
    assert masks.kept(paths.live(model, whole, (3, 2, 2))) == masks.kept(whole)
    cut = {**whole, "embed.weight": torch.zeros(8, 3).bool()}
    assert masks.kept(paths.live(model, cut, (3, 2, 2))) == 0


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
    found = paths.live(model, ones_for(model), (1, 4, 4))
    assert masks.kept(found) == 27 + 24


def test_model_masks_and_rng_are_left_as_they_were() -> None:
    model = make_model("test_nfnet").train()
    chosen = ones_for(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    rng = torch.get_rng_state()
    first = paths.live(model, chosen, (1, 16, 16))
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training and "forward" not in vars(model.stem.conv1)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert all(mask.all() for mask in chosen.values())
    again = paths.live(model, chosen, (1, 16, 16))
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
        for name, weight in models.prunable(model).items()
    }
    expected = reachable(list(chosen.values()))
    found = paths.live(model, chosen, (5, 1, 1))
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
        for name, weight in models.prunable(model).items()
    }
    edges = [unrolled(mask, *size) for mask, size in zip(chosen.values(), sizes, strict=True)]
    fed = [{(0, y, x) for y in range(3) for x in range(2)}]
    for layer in edges:
        fed.append({to for start, to, _ in layer if start in fed[-1]})
    heard = [{(channel, y, 0) for channel in range(2) for y in range(2)}]
    for layer in reversed(edges):
        heard.append({start for start, to, _ in layer if to in heard[-1]})
    heard.reverse()
    found = paths.live(model, chosen, (1, 3, 2))
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
    found = paths.live(model, ones_for(model), (4, 4, 4))
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
    model = models.create(config, num_classes=4, in_chans=3, image_size=32, seed=0)
    chosen = ones_for(model)
    assert masks.kept(paths.live(model, chosen, (3, 32, 32))) == masks.kept(chosen)


def test_a_branch_whose_gain_starts_at_zero_is_live() -> None:
    """NFNet's skipinit: the gain is trained, so the branch is no dead one."""
    model = Named(
        lambda net, x: net.head(x.flatten(1) + net.gain * net.branch(x.flatten(1))),
        branch=nn.Linear(3, 3), head=nn.Linear(3, 2),
    )  # fmt: skip
    model.gain = nn.Parameter(torch.zeros(()))
    found = paths.live(model, ones_for(model), (3, 1, 1))
    assert found["branch.weight"].all()


def test_a_head_that_is_not_pruned_may_be_zero() -> None:
    """Excluded from pruning, and at zero to start with, as timm's mixers have it."""
    model = chain(3, 4, 2)
    with torch.no_grad():
        model[3].weight.zero_()
    found = paths.live(model, {"1.weight": torch.ones(4, 3).bool()}, (3, 1, 1))
    assert found["1.weight"].all()


def test_positions_are_no_input() -> None:
    """With its patches cut off, what a transformer says is a constant."""
    config = ModelConfig("test_vit", {"patch_size": 8})
    model = models.create(config, num_classes=4, in_chans=3, image_size=32, seed=0)
    chosen = ones_for(model)
    chosen["patch_embed.proj.weight"][:] = False
    assert masks.kept(paths.live(model, chosen, (3, 32, 32))) == 0


def test_live_may_be_asked_for_without_gradients() -> None:
    model = chain(3, 4, 2)
    with torch.no_grad():
        found = paths.live(model, ones_for(model), (3, 1, 1))
    assert masks.kept(found) == 20


# The shape of an image


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
    return paths.without_shifts(model, models.prunable(model))


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
            torch.testing.assert_close(found * 2.0**rescaling.log2, scale * expected)


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
