"""PX: by hand, and against every path of a small ReLU network written out."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from autosparse import criteria
from autosparse.core.errors import UsageError
from autosparse.models.gradients import Shared, counting
from autosparse.sparsity import paths
from tests.criteria.plain import (
    chain,
    convnet,
    fallen_below_zero,
    flat,
    images,
    in_rounds,
    samples,
)

px = criteria.get("px")


def shares(scores: Tensor) -> Tensor:
    """Scores are right up to one common factor."""
    return scores / scores.sum()


def test_by_hand() -> None:
    # Two inputs, two hidden units, two outputs; the weight 0 is no path.
    # (1, 1): both units open (3 and 2), each fed 1 + 1 = 2: outputs 2 and 2 + 2.
    # (1, -2): the first is closed (-3), the second open (5) and fed 1 + 4: outputs 0 and 5.
    # z1 = mean = (1, 4.5). Squared weights: 1, 4; 9, 1 and 4, 0; 1, 9. Each score adds up its paths
    # to both outputs: first layer 1 * (4 * 1 + 1 * 4.5) = 8.5, 4 * 8.5 = 34, 9 * 9 * 4.5 = 364.5,
    # 40.5; second 4 * (1 + 4) * 1 = 20, 0; 1 * 5 * 4.5 = 22.5, 9 * (9 + 1) * 4.5 = 405.
    model = chain([[1.0, 2.0], [3.0, -1.0]], [[2.0, 0.0], [1.0, 3.0]], between=nn.ReLU)
    batch = samples(([1, 1], [0]), ([1, -2], [0]))
    scores = px(model, [batch], cross_entropy, sparsity=0.0, rounds=1)
    expected = torch.tensor([8.5, 34, 364.5, 40.5, 20, 0, 22.5, 405]).double()
    torch.testing.assert_close(shares(flat(scores)), shares(expected), rtol=1e-6, atol=0)


def test_one_activation_object_held_twice_is_as_two() -> None:
    weights = [[[1.0, 2.0], [3.0, -1.0]], [[2.0, -3.0], [1.0, 3.0]], [[1.0, 0.0], [1.0, 3.0]]]
    two, one = (chain(*weights, between=nn.ReLU) for _ in range(2))
    one[3] = one[1]
    batch = samples(([1, 1], [0]), ([1, -2], [0]))
    options = {"sparsity": 0.0, "rounds": 1}
    expected, found = (flat(px(each, [batch], cross_entropy, **options)) for each in (two, one))
    torch.testing.assert_close(shares(found), shares(expected))


def test_the_activation_inside_a_norm_is_as_one_behind_it() -> None:
    """timm's BatchNormAct2d holds its activation. Class 0 hears of one place in four."""

    def network(*behind: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        last = nn.Linear(12, 2)
        last.weight.data[0, torch.arange(12) % 4 > 0] = 0
        layers = nn.Conv2d(2, 4, 3), *behind, nn.Conv2d(4, 3, 3), nn.Flatten(), last
        return nn.Sequential(*layers).double().eval()

    batch = torch.randn(2, 2, 6, 6).double(), torch.tensor([0, 1])
    plain = network(nn.BatchNorm2d(4), nn.ReLU())
    inside = network(BatchNormAct2d(4))
    options = {"sparsity": 0.0, "rounds": 1}
    expected, found = (flat(px(m, [batch], cross_entropy, **options)) for m in (plain, inside))
    torch.testing.assert_close(shares(found), shares(expected))


def test_functions_in_place_of_modules_are_warned_of() -> None:
    batch = samples(([1, 1], [0]))
    with pytest.warns(UserWarning, match="px finds no activation among the modules of Sequential"):
        px(chain([[1.0, 2.0]], [[2.0]]), [batch], cross_entropy, sparsity=0.0, rounds=1)


WIDTHS = (3, 4, 3, 2)
NAMES = ("0.weight", "2.weight", "4.weight")


def relu_net(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return chain(
        *(torch.randn(there, here).tolist() for here, there in pairwise(WIDTHS)),
        between=nn.ReLU,
    )


def data(*sizes: int, inputs: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(sum(sizes), inputs, generator=generator).double()
    labels = torch.zeros(sum(sizes), dtype=torch.long)
    return list(zip(pixels.split(list(sizes)), labels.split(list(sizes)), strict=True))


def along_paths(model: nn.Module, own: list[Tensor]) -> list[Tensor]:
    """R = sum over samples and outputs of z1 * z2, by θ²; times θ². All in Python numbers."""
    weights = [model.get_parameter(name).detach().tolist() for name in NAMES]
    (pixels, _), paths = data(6)[0], list(product(*(range(width) for width in WIDTHS)))

    def steps(path):
        return [(layer, path[layer + 1], path[layer]) for layer in range(3)]

    alive = [p for p in paths if all(weights[layer][o][i] != 0 for layer, o, i in steps(p))]
    z1 = [0.0] * WIDTHS[-1]
    for image in pixels:
        first = model[0](image)
        second = model[2](first.relu())
        for path in alive:
            if first[path[1]] > 0 and second[path[2]] > 0:
                z1[path[-1]] += float(image[path[0]]) ** 2
    scores = [torch.zeros_like(each) for each in own]
    for path in alive:
        share = z1[path[-1]]
        for layer, o, i in steps(path):
            share *= weights[layer][o][i] ** 2
        for layer, o, i in steps(path):
            scores[layer][o, i] += share
    return scores


def test_the_reference_closes_units() -> None:
    # Otherwise the patterns are not tested.
    model, pixels = relu_net(), data(6)[0][0]
    assert 0 < (model[1](model[0](pixels)) > 0).double().mean() < 1
    assert 0 < (model[:4](pixels) > 0).double().mean() < 1


@pytest.mark.parametrize("sizes", [(6,), (4, 2), (1, 5)])
def test_against_every_path(sizes: tuple[int, ...]) -> None:
    model = relu_net()
    scores = px(model, data(*sizes), cross_entropy, sparsity=0.0, rounds=1)
    expected = along_paths(model, [model.get_parameter(name).detach() for name in NAMES])
    expected = torch.cat([each.flatten() for each in expected])
    torch.testing.assert_close(shares(flat(scores)), shares(expected), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("sparsity", "rounds"), [(0.5, 1), (0.6, 4), (0.85, 7)])
def test_rounds_against_every_path(sparsity: float, rounds: int) -> None:
    # Patterns and paths are those of the network as it is pruned by then.
    model = relu_net()
    found = flat(px(model, data(6), cross_entropy, sparsity=sparsity, rounds=rounds))
    scores, kept = in_rounds(model, NAMES, along_paths, sparsity, rounds)
    expected = fallen_below_zero(scores, kept)
    alive = expected >= 0
    assert torch.equal(found[~alive], expected[~alive])
    torch.testing.assert_close(shares(found[alive]), shares(expected[alive]), rtol=1e-6, atol=0)


def test_the_data_count() -> None:
    # Paths from an input that is always zero count for z2 only; with one output more than one
    # hidden unit feeds, what data reach an output decides.
    weights = [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]
    model = chain(*weights, between=nn.ReLU)
    scores = px(model, [samples(([2, 1], [0]))], cross_entropy, sparsity=0.0, rounds=1)
    # Two separate paths with z2 = 1 and z1 = 4 and 1.
    found = shares(flat(scores))[[0, 3, 4, 7]]
    torch.testing.assert_close(found, torch.tensor([0.4, 0.1, 0.4, 0.1]).double())


def test_norms_are_left_out_of_the_sums_but_not_of_the_patterns() -> None:
    def net(shift: float) -> nn.Module:
        model = nn.Sequential(
            chain([[1.0, 1.0], [1.0, 1.0]])[0],
            nn.BatchNorm1d(2),
            nn.ReLU(),
            chain([[1.0, 0.0], [0.0, 1.0]])[0],
        ).double()
        model[1].running_var.fill_(16)
        model[1].bias.data = torch.tensor([0.0, shift]).double()
        return model

    batch = samples(([1, 1], [0]))
    options = {"sparsity": 0.0, "rounds": 1, "training_mode": False}
    both = px(net(0.0), [batch], cross_entropy, **options)
    # Unit two says 2 / 4 - 1 < 0 with a shift of -1.
    one = px(net(-1.0), [batch], cross_entropy, **options)
    # z1 = (2, 2) and each path counts once: the rows of layer one 1/8, of layer two 1/4.
    found = shares(flat(both))
    torch.testing.assert_close(
        found, torch.tensor([1, 1, 1, 1, 2, 0, 0, 2]).double() / 8, rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        shares(flat(one)), torch.tensor([1, 1, 0, 0, 2, 0, 0, 0]).double() / 4, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("sizes", [(5, 3), (1, 6, 1), (2, 2, 2, 2)])
def test_in_eval_mode_the_cut_into_batches_does_not_matter(sizes: tuple[int, ...]) -> None:
    model = convnet()
    model[2] = nn.ReLU()
    options = {"sparsity": 0.8, "rounds": 4, "training_mode": False}
    whole = px(model, images(8), cross_entropy, **options)
    parts = px(model, images(*sizes), cross_entropy, **options)
    torch.testing.assert_close(flat(parts), flat(whole), rtol=1e-9, atol=1e-14)


def test_cost() -> None:
    # Per round two forward passes over every image, and one pass of the ones.
    with counting() as cost:
        px(relu_net(), data(4, 2), cross_entropy, sparsity=0.5, rounds=5)
    assert cost.image_passes == pytest.approx(5 * (6 * 2 / 3 + 1))


@pytest.mark.parametrize("rounds", [0, -1])
def test_it_needs_a_round(rounds: int) -> None:
    with pytest.raises(UsageError, match=f"rounds must be at least 1, got {rounds}"):
        px(relu_net(), data(4), cross_entropy, sparsity=0.5, rounds=rounds)


def test_a_sparsity_out_of_range() -> None:
    with pytest.raises(UsageError, match="sparsity must be at least 0 and below 1"):
        px(relu_net(), data(4), cross_entropy, sparsity=1.0, rounds=1)


def test_half_precision_is_scored_in_float32() -> None:
    model = relu_net().bfloat16()
    inputs, labels = data(20)[0]
    options = {"sparsity": 0.5, "rounds": 1}
    found = px(model, [(inputs.bfloat16(), labels)], cross_entropy, **options)
    rounded = [(inputs.bfloat16().float(), labels)]
    expected = px(model.float(), rounded, cross_entropy, **options)
    assert all(torch.equal(score, expected[name]) for name, score in found.items())


def test_what_ranks_add_up_has_one_shape_with_and_without_batches(monkeypatch) -> None:
    """A rank's share may be empty; all-reduce wants the same shape on all."""
    shapes: list[torch.Size] = []

    def add_up(tensor: Tensor) -> None:
        shapes.append(tensor.shape)
        if not tensor.is_floating_point():
            tensor.fill_(2)  # As if another rank had two samples.

    monkeypatch.setattr(dist, "all_reduce", add_up)
    monkeypatch.setattr(dist, "broadcast", lambda tensor, rank: None)
    model = chain([[1.0, 2.0], [3.0, -1.0]], [[2.0, 0.0], [1.0, 3.0]], between=nn.ReLU)
    monkeypatch.setattr(paths, "expected_shape", lambda model: (2,))
    for share in ([samples(([1, 1], [0]))], []):
        px(model, Shared(share), cross_entropy, sparsity=0.5, rounds=1)
    assert shapes[0] == shapes[2] == (1,)
    assert shapes[1] == shapes[3] == (1, 2)
