"""Smaller networks with the same logits; which units go is worked out by hand."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autosparse import compact, densify, prune, slim
from autosparse.core.errors import RunFailed, UsageError
from tests.sparsity.slimming import images_of, same_logits, spoilt


def shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(each.shape) for name, each in model.named_parameters()}


def zero(tensor: Tensor, *index: object) -> None:
    with torch.no_grad():
        tensor[index] = 0


class Convs(nn.Module):
    """Two convolutions with zero padding, a norm between them, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 3, 3, padding=1)
        self.head = nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv2(F.relu(self.norm(self.conv1(images))))
        return self.head(F.relu(hidden).mean((2, 3)))


def convs() -> Convs:
    torch.manual_seed(0)
    model = Convs().eval()
    with torch.no_grad():
        model.norm.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.1]))
        model.norm.running_var.copy_(torch.tensor([0.5, 2.0, 1.5, 1.0]))
        model.norm.bias.copy_(torch.tensor([0.3, 0.5, -2.0, 0.2]))
    zero(model.conv1.weight, slice(1, 3))  # Channel 1 is 0.5 + 0.2 / sqrt(2) then, channel 2 zero.
    zero(model.conv2.weight, slice(None), 3)  # Nobody listens to channel 3.
    return model


def test_channels_that_are_constant_or_unheard_go() -> None:
    model = convs()
    images = torch.randn(2, 1, 6, 7)
    small = slim(model, images, multiple=1)
    assert shapes(small)["conv1.weight"] == [1, 1, 3, 3]
    assert shapes(small)["norm.weight"] == [1]
    assert shapes(small)["conv2.weight"] == [3, 1, 3, 3]
    same_logits(small, model, images)
    assert small.slimmed["parameters"] == [
        sum(p.numel() for p in each.parameters()) for each in (model, small)
    ]
    assert small.slimmed["changed"]["norm.weight"] == [[4], [1]]


def test_zeros_around_the_picture_are_exact_and_cost_three_rows() -> None:
    """A constant channel differs at the edges only after a 3x3 kernel: [1, 3, 3, 3] holds all."""
    small = slim(convs(), torch.zeros(2, 1, 6, 7), multiple=1)
    constants = {n: list(each.shape) for n, each in small.named_buffers() if "constants" in n}
    assert [1, 3, 3, 3] in constants.values()
    constant = torch.full((1, 1, 6, 7), 0.5 + 0.2 / 2.0**0.5 / (1 + 1e-5 / 2) ** 0.5)
    expected = F.conv2d(constant, convs().conv2.weight[:, 1:2], padding=1)
    found = small.constants.conv2d_1 if hasattr(small, "constants") else torch.zeros(0)
    torch.testing.assert_close(found[0, :, 1, 1], expected[0, :, 2, 3])
    torch.testing.assert_close(found[0, :, 0, 0], expected[0, :, 0, 0])


def test_the_model_is_left_alone() -> None:
    model = convs().train()
    before = copy.deepcopy(model.state_dict())
    slim(model, torch.zeros(2, 1, 6, 6))
    assert model.training
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_a_hidden_unit_without_input_goes_into_the_next_bias() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)).eval()
    zero(model[1].weight, 2)
    small = slim(model, torch.randn(2, 1, 2, 2))
    assert shapes(small) == {"1.weight": [4, 4], "1.bias": [4], "3.weight": [3, 4], "3.bias": [3]}
    added = model[3].weight[:, 2] * F.gelu(model[1].bias[2])
    torch.testing.assert_close(small.get_parameter("3.bias"), model[3].bias + added)


def test_modes_of_frozen_norms_are_put_back() -> None:
    model = convs().train()
    model.norm.eval()
    slim(model, torch.zeros(2, 1, 6, 6))
    assert model.training and model.conv1.training and not model.norm.training


class Wide(nn.Module):
    """Two convolutions with twelve channels between them, behind a norm, and a classifier."""

    def __init__(self, padding: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, 3, padding=padding, bias=False)
        self.norm1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 6, 3, padding=padding, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.norm1(self.conv1(images))))).mean((2, 3)))

    def second(self, hidden: Tensor) -> Tensor:
        return self.norm2(self.conv2(hidden))


def wide(kind: type[Wide] = Wide) -> Wide:
    """Return it in eval mode, with statistics and biases that are no initial ones."""
    torch.manual_seed(0)
    model = kind().eval()
    with torch.no_grad():
        for norm in (model.norm1, model.norm2):
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)
            norm.weight.uniform_(0.5, 2)
            norm.bias.uniform_(0.5, 1)
    return model


@pytest.mark.parametrize(
    ("gone", "multiple", "left"), [(5, 4, 8), (5, 1, 7), (3, 4, 12), (8, 4, 4), (5, 8, 8)]
)
def test_channels_of_convolutions_stay_multiples(gone: int, multiple: int, left: int) -> None:
    """12 channels without the last `gone`, rounded up: to what is there, at most."""
    model, images = wide(), torch.randn(2, 1, 6, 6)
    zero(model.conv2.weight, slice(None), slice(12 - gone, None))  # Nobody listens to these.
    small = slim(model, images, multiple=multiple)
    assert shapes(small)["conv1.weight"] == [left, 1, 3, 3]
    assert shapes(small)["norm1.weight"] == [left]
    assert shapes(small)["conv2.weight"] == [6, left, 3, 3]  # 6 is no multiple, and stays.
    same_logits(small, model, images)


class ByTheBatch(Wide):
    """Its second norm goes by the batch in eval mode, too, and is given statistics all the same."""

    def second(self, hidden: Tensor) -> Tensor:
        norm = self.norm2
        statistics = norm.running_mean, norm.running_var
        return F.batch_norm(self.conv2(hidden), *statistics, norm.weight, norm.bias, True, 0.0)


class Computed(Wide):
    """Gain and variance of its second norm are computed."""

    def second(self, hidden: Tensor) -> Tensor:
        norm = self.norm2
        gain, variance = F.softplus(norm.weight), norm.running_var * 1.5 + 0.1
        return F.batch_norm(self.conv2(hidden), norm.running_mean, variance, gain, norm.bias)


class Cast(Wide):
    """A part without weights is cast: what is stored of it cannot be called `to`, as a method."""

    def second(self, hidden: Tensor) -> Tensor:
        return self.norm2(self.conv2(hidden)) + self.conv1.weight[0, 0, 0, 0].to(hidden.dtype)


class Largest(Wide):
    """It gives the largest value of every channel."""

    def second(self, hidden: Tensor) -> Tensor:
        return F.adaptive_max_pool2d(self.norm2(self.conv2(hidden)), 1)


class Viewed(Wide):
    """What it views lies side by side only where channels do."""

    def second(self, hidden: Tensor) -> Tensor:
        last = self.norm2(self.conv2(hidden)).permute(0, 2, 3, 1)
        return last.view(hidden.shape[0], 36, 6).transpose(1, 2)[..., None]


@pytest.mark.parametrize("kind", [ByTheBatch, Computed, Cast, Largest, Viewed])
def test_norms_casts_and_views_of_other_kinds(kind: type[Wide]) -> None:
    """Channels 0 to 4 are constant behind the first norm, and differ at the edges after that."""
    model, images = wide(kind), torch.randn(2, 1, 6, 6)
    zero(model.conv1.weight, slice(0, 5))
    if kind is Cast:
        model.conv1.weight.data[0, 0, 0, 0] = 0.3
    if kind is Viewed:
        model = model.to(memory_format=torch.channels_last)
    small = slim(model, images, multiple=1)
    assert shapes(small)["conv2.weight"][1] == (8 if kind is Cast else 7)
    same_logits(small, model, images)


def test_memory_formats_stay() -> None:
    model = wide().to(memory_format=torch.channels_last)
    zero(model.conv1.weight, slice(0, 5))
    small = slim(model, torch.zeros(2, 1, 6, 6))
    weight = small.get_parameter("conv2.weight")
    assert list(weight.shape) == [6, 8, 3, 3]
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_what_rounds_up_needs_nothing_more() -> None:
    """Five channels are heard all along. The others, of which three come back, hear all of them."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4, 2)).eval()
    zero(model[5].weight.view(2, 64, 4), slice(None), slice(0, -5))
    zero(model[2].weight, slice(-5, None), slice(0, -5))
    images = torch.randn(2, 3, 2, 2)
    small = slim(model, images)
    assert shapes(small)["0.weight"] == [8, 3, 1, 1]
    assert shapes(small)["2.weight"] == [8, 8, 1, 1]
    same_logits(small, model, images)


def test_a_picture_is_cut_along_all_dimensions() -> None:
    """Half of the channels are constants that differ by token, and five of the tokens go."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.channels1, self.tokens1 = nn.Linear(3, 6), nn.Linear(16, 12)
            self.channels2, self.tokens2 = nn.Linear(6, 10), nn.Linear(12, 5)
            self.head = nn.Linear(10, 4)

        def forward(self, images: Tensor) -> Tensor:
            signal = self.channels1(images.flatten(2).transpose(1, 2)).sigmoid()
            signal = self.tokens1(signal.transpose(1, 2)).sigmoid().transpose(1, 2)
            signal = self.channels2(signal).sigmoid()
            signal = self.tokens2(signal.transpose(1, 2)).sigmoid().transpose(1, 2)
            return self.head(signal).mean(1)

    torch.manual_seed(0)
    model, images = Mixer().eval(), torch.randn(2, 3, 4, 4)
    zero(model.channels1.weight, slice(0, 3))
    zero(model.tokens2.weight, slice(None), slice(4, 9))
    small = slim(model, images)
    assert shapes(small)["tokens1.weight"] == [7, 16]
    assert shapes(small)["channels2.weight"] == [10, 3]
    same_logits(small, model, images)


@pytest.mark.parametrize("multiple", [0, -4, 2.5])
def test_a_multiple_is_a_whole_number(multiple: float) -> None:
    with pytest.raises(UsageError, match="give a whole number from 1 on"):
        slim(convs(), torch.zeros(2, 1, 6, 6), multiple=multiple)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [0.5, 1 + 1e-6])
def test_wrong_logits_are_an_error(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny ones, too: a layer is spoilt while the graph is made smaller."""
    from autosparse.sparsity import slim as module

    def spoils(small: nn.Module, *_: object) -> None:
        with torch.no_grad():
            small.get_parameter("head.weight").mul_(wrong)

    model = copy.deepcopy(convs())
    with torch.no_grad():
        model.head.weight.mul_(1e-3)
        model.head.bias.mul_(1e-3)
    monkeypatch.setattr(module, "rewrite", spoils)
    with pytest.raises(RunFailed, match="of the largest in float64: that is a fault of slimming"):
        slim(model, torch.zeros(2, 1, 6, 6))


def test_a_picture_is_added_behind_the_norm_that_engines_make_one_with_its_layer() -> None:
    model, images = wide(), torch.randn(2, 1, 6, 6)
    zero(model.conv1.weight, slice(4, None))  # Eight channels are constants that conv2 hears.
    small = slim(model, images)
    assert shapes(small)["conv1.weight"] == [4, 1, 3, 3]
    names = [str(node.target) for node in small.graph.nodes if node.op == "call_function"]
    one, norm, add = (
        next(place for place, name in enumerate(names) if each in name and place >= start)
        for each, start in (("conv2d", 2), ("batch_norm", 2), ("add", 0))
    )
    assert one + 1 == norm < add
    same_logits(small, model, images)


class Residual(nn.Module):
    """x + f(x), twice, of 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 1)
        self.one, self.two = (
            nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)) for _ in range(2)
        )
        self.head = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        found = self.stem(images)
        found = found + self.one(found)
        found = found + self.two(found)
        return self.head(found.mean((2, 3)))


def test_a_channel_of_a_sum_goes_where_no_summand_moves_it() -> None:
    torch.manual_seed(0)
    model, images = Residual().eval(), torch.randn(2, 1, 5, 5)
    for layer in (model.stem, model.one[2], model.two[2]):
        zero(layer.weight, 1)
    for layer in (model.stem, model.one[2]):
        zero(layer.weight, 2)  # The second block still writes channel 2.
    small = slim(model, images, multiple=1)
    assert shapes(small)["stem.weight"] == [3, 1, 1, 1]
    assert shapes(small)["two.2.weight"] == [3, 6, 1, 1]
    same_logits(small, model, images)


def test_a_whole_branch_goes() -> None:
    torch.manual_seed(0)
    model, images = Residual().eval(), torch.randn(2, 1, 5, 5)
    zero(model.one[2].weight)
    small = slim(model, images)
    assert not any(name.startswith("one") for name in shapes(small))
    same_logits(small, model, images)


def test_where_nothing_lives_logits_are_a_constant_for_any_batch() -> None:
    model = convs()
    zero(model.conv2.weight)
    small = slim(model, torch.zeros(2, 1, 6, 6))
    assert not shapes(small)
    for count in (1, 3):
        same_logits(small, model, torch.randn(count, 1, 6, 6))


class Groups(nn.Module):
    """Depthwise and grouped convolutions, concatenation and squeeze-excite."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        one = F.relu(self.stem(images))
        found = self.grouped(torch.cat([one, F.relu(self.depthwise(one))], 1))
        gate = self.excite(F.relu(self.squeeze(found.mean((2, 3), keepdim=True))))
        return self.head((found * gate.sigmoid()).mean((2, 3)))


def test_groups_go_as_a_whole() -> None:
    """Group 1 reads channels 2 and 3, group 3 the same after the depthwise convolution."""
    torch.manual_seed(0)
    model, images = Groups().eval(), torch.randn(2, 3, 6, 6)
    for group in (1, 3):
        zero(model.grouped.weight, slice(2 * group, 2 * group + 2))
        zero(model.grouped.bias, slice(2 * group, 2 * group + 2))
    small = slim(model, images)
    found = shapes(small)
    assert found["stem.weight"] == [2, 3, 1, 1]
    assert found["depthwise.weight"] == [2, 1, 3, 3]
    assert found["grouped.weight"] == [4, 2, 3, 3]
    assert found["squeeze.weight"] == [2, 4, 1, 1]
    assert found["excite.weight"] == [4, 2, 1, 1]
    same_logits(small, model, images)


class Windows(nn.Module):
    """Attention in windows of four, with a bias a pair of tokens that is looked up in a table."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(3, 3) for _ in range(3))
        self.table = nn.Parameter(torch.randn(7, 1))
        row = torch.arange(4)
        self.register_buffer("places", row[:, None] - row + 3)  # 0 to 6 [4, 4].
        self.head = nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(2).transpose(1, 2).reshape(-1, 4, 3)
        scores = self.query(tokens) @ self.key(tokens).transpose(1, 2)
        shares = (scores + self.table[self.places.view(-1)].view(4, 4)).softmax(-1)
        found = (shares @ self.value(tokens)).view(images.shape[0], -1, 3)
        return self.head(found[:, 0])


def test_places_that_are_looked_up_in_a_table_stay_whole() -> None:
    """Without a query the shares hang on the table only, for as many windows as there are."""
    torch.manual_seed(0)
    model, images = Windows().eval(), torch.randn(2, 3, 2, 4)
    zero(model.query.weight)
    zero(model.query.bias)
    small = slim(model, images)
    assert list(small.get_buffer("places").shape) == [4, 4]
    assert shapes(small)["table"] == [7, 1]
    assert shapes(small)["key.weight"] == [1, 3]
    same_logits(small, model, images)


class Edges(nn.Module):
    """A sum of two convolutions, read by a third."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 1)
        self.conv1, self.conv2 = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 3, padding=1)
        self.conv3 = nn.Conv2d(2, 2, 3)

    def forward(self, images: Tensor) -> Tensor:
        found = self.stem(images)
        found = found + self.conv2(self.conv1(found))
        return self.conv3(found).amax((2, 3))


def test_a_constant_branch_keeps_its_edges() -> None:
    """conv1 gives its bias everywhere, so the branch is a picture with other values at the edges.

    It is stored as [1, 2, 3, 3], with a place for each of eight rows and eight columns.
    """
    torch.manual_seed(0)
    model, images = Edges().eval(), torch.randn(2, 1, 8, 8)
    zero(model.conv1.weight)
    small = slim(model, images)
    stored = sorted(list(each.shape) for name, each in small.named_buffers() if "const" in name)
    assert stored == [[1, 2, 3, 3], [8], [8]]
    same_logits(small, model, images)


class Picked(nn.Module):
    """Of six tokens only some are read on."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embed, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("mask", torch.tensor([[True, False, True], [False, True, True]]))

    def forward(self, images: Tensor) -> Tensor:
        found = self.embed(images)
        best = found.sum((0, 1, 3)).topk(2).indices
        if self.how == "index":
            found = found[:, :, best]
        elif self.how == "index_select":
            found = found.index_select(2, best)
        elif self.how == "mask":
            found = found[:, self.mask]
        else:
            found = found.roll(3)
        return self.head(F.relu(found)).flatten(1, -2).mean(1)


@pytest.mark.parametrize("how", ["index", "index_select", "mask", "roll"])
def test_what_picks_or_rolls_tokens_is_exact(how: str) -> None:
    """By places that the image tells, by a mask of two dimensions, or around all dimensions.

    The sum over channels that tells the places hears of all; the other two keep what they read.
    """
    torch.manual_seed(0)
    model, images = Picked(how).eval(), torch.randn(2, 2, 3, 4)
    zero(model.embed.weight, 1)
    zero(model.head.weight, slice(None), 2)
    small = slim(model, images)
    assert shapes(small)["embed.weight"] == [6, 4]
    same_logits(small, model, images)


class Overwritten(nn.Module):
    """Adds in place to a part of a tensor, as GhostNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 4, 1), nn.Linear(3, 2)

    def forward(self, images: Tensor) -> Tensor:
        found = self.stem(images)[:, :3]
        found += images
        return self.head(F.relu(found).mean((2, 3)))


def test_channels_that_are_overwritten_in_part_stay() -> None:
    torch.manual_seed(0)
    model, images = Overwritten().eval(), torch.randn(2, 1, 4, 4)
    zero(model.head.weight, slice(None), 1)
    small = slim(model, images)
    assert shapes(small)["head.weight"] == [2, 3]
    assert small.slimmed["kept_whole"]["slice_scatter"] > 0
    same_logits(small, model, images)


class Attention(nn.Module):
    """Three heads of four, and a hidden layer behind a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.norm = nn.LayerNorm(6)
        self.qkv, self.out = nn.Linear(6, 36), nn.Linear(12, 6)
        self.hidden, self.back = nn.Linear(6, 7), nn.Linear(7, 6)

    def forward(self, images: Tensor) -> Tensor:
        found = self.embed(images.flatten(1, 2))
        heads = self.qkv(self.norm(found)).reshape(found.shape[0], -1, 3, 3, 4)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        found = found + self.out(mixed.transpose(1, 2).flatten(2))
        return self.back(F.gelu(self.hidden(self.norm(found)))).mean(1)


@pytest.mark.parametrize("dead", ["values", "projection"])
def test_a_head_goes_with_its_projections(dead: str) -> None:
    torch.manual_seed(0)
    model, images = Attention().eval(), torch.randn(2, 1, 3, 5)
    if dead == "values":
        zero(model.qkv.weight, slice(24 + 4, 24 + 8))  # Its values are the bias, which is added.
    else:
        zero(model.out.weight, slice(None), slice(4, 8))
    zero(model.hidden.weight, slice(0, 2))
    small = slim(model, images)
    found = shapes(small)
    assert found["qkv.weight"] == [24, 6] and found["out.weight"] == [6, 8]
    assert found["hidden.weight"] == [5, 6] and found["back.weight"] == [6, 5]
    same_logits(small, model, images)


def test_channels_that_a_layer_norm_reads_stay() -> None:
    torch.manual_seed(0)
    model, images = Attention().eval(), torch.randn(2, 1, 3, 5)
    zero(model.embed.weight, 3)
    zero(model.out.weight, 3)
    small = slim(model, images)
    assert shapes(small)["embed.weight"] == [6, 5]
    assert small.slimmed["kept_whole"]["layer_norm"] > 0
    same_logits(small, model, images)


class Undecided(nn.Module):
    """What it computes hangs on the values of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.flatten(1)) if images.sum() > 0 else images.flatten(1)


def test_what_cannot_be_traced_is_told_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"Undecided cannot be traced by torch\.export") as caught:
        slim(Undecided(), torch.zeros(2, 1, 2, 2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("density", "dead"), [(0.05, 0), (0.2, 5), (0.001, 0)])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_random_masks(name: str, density: float, dead: int) -> None:
    torch.manual_seed(0)
    options = {"img_size": 32} if "vit" in name else {}
    model = spoilt(timm.create_model(name, num_classes=10, **options), density, dead)
    images = images_of(32)
    small = slim(model, images)
    assert small.slimmed["parameters"][1] < small.slimmed["parameters"][0]
    same_logits(small, model, images)


@pytest.mark.parametrize("fused", [True, False])
def test_what_all_keys_share_moves_no_attention(fused: bool) -> None:
    """A place of all heads whose query and key are biases only adds the same to every key."""
    model = timm.create_model("test_vit", num_classes=5, img_size=32, patch_size=8)
    model = spoilt(model, 1.0)
    attention = model.blocks[0].attn
    attention.fused_attn = fused
    width = attention.head_dim
    with torch.no_grad():
        for first in range(0, len(attention.qkv.weight), width):
            attention.qkv.weight[first + 3] = 0
        for first in range(0, attention.proj.weight.shape[1], width):
            attention.proj.weight[:, first + 3] = 0
    images = images_of(32)
    small = slim(model, images)
    rows = small.get_parameter("blocks.0.attn.qkv.weight").shape[0]
    assert rows == len(attention.qkv.weight) * (width - 1) // width
    same_logits(small, model, images)


def test_a_compact_model_is_to_be_densified_first() -> None:
    model = convs()
    images = torch.randn(2, 1, 8, 8)
    compact(model, prune(model, [(images, torch.tensor([0, 1]))], "magnitude", 0.5))
    with pytest.raises(UsageError, match=r"compact \(at conv1.weight\); slim autosparse.densify"):
        slim(model, images)
    densify(model)
    same_logits(model, slim(model, images), images)
