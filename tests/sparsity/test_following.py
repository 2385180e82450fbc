"""Paths are followed through what real models do; only what cannot be followed says so."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import Tensor, nn
from torch.nn import functional

from autosparse import criteria, prune
from autosparse.core.errors import UsageError
from autosparse.criteria.scoring import Selection
from autosparse.models import numerics, zoo
from autosparse.sparsity import masks, paths, reach
from tests.conftest import make_model
from tests.sparsity.test_reach import Named, chain, ones_for

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "cait_xxs24_224": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    "swinv2_tiny_window8_256": {
        "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2),
    },
    "beit_base_patch16_224": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
}  # fmt: skip


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=4, img_size=32, **SMALL[name])


def batch(side: int = 32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, side, side, generator=generator), torch.arange(4))]


# Liveness


@pytest.mark.parametrize("name", SMALL)
def test_all_of_a_dense_transformer_is_live(name: str) -> None:
    """Class attention needs its token, which nothing else feeds, and is no "token" by its name."""
    model = small(name)
    chosen = ones_for(model)
    assert masks.kept(reach.live(model, chosen, (3, 32, 32))) == masks.kept(chosen)


def test_a_gain_with_token_in_its_name_is_no_token() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.head(net.token_mixer_gain * net.token_mixer(x.flatten(1)))

    model = Named(forward, token_mixer=nn.Linear(3, 3), head=nn.Linear(3, 2))
    model.token_mixer_gain = nn.Parameter(torch.ones(3))
    found = reach.live(model, ones_for(model), (3, 1, 1))
    assert masks.kept(found) == 15


def test_what_is_added_is_no_input_whatever_its_name() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.head(net.first(x.flatten(1)) * 0 + net.place).relu()

    model = Named(forward, first=nn.Linear(3, 3), head=nn.Linear(3, 2))
    model.place = nn.Parameter(torch.ones(3))
    assert masks.kept(reach.live(model, ones_for(model), (3, 1, 1))) == 0


# SynFlow


@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "beit_base_patch16_224"])
def test_weights_that_are_used_by_function_calls_stay_whole(name: str) -> None:
    """As without leaving channels out, down to 2 %."""
    from autosparse.criteria import synflow as module

    model, options = small(name), {"sparsity": 0.98, "rounds": 20}
    synflow = criteria.get("synflow")
    scores = synflow(model, batch(), functional.cross_entropy, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_maps_channels", lambda layer: False)
        expected = synflow(model, batch(), functional.cross_entropy, **options)
    for layer, wanted in expected.items():
        torch.testing.assert_close(scores[layer], wanted, rtol=1e-4, atol=0.0)


class Branches(nn.Module):
    """Gives a list, as the stages of an HRNet do."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, signal: Tensor) -> list[Tensor]:
        return [self.left(signal), self.right(signal)]


class Joined(nn.Module):
    def forward(self, parts: list[Tensor]) -> Tensor:
        return parts[0] + parts[1]


def test_modules_that_give_lists_are_no_points_to_rescale_at() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), Branches(), Joined(), nn.Linear(4, 2))
    copied = paths.without_shifts(model, zoo.prunable(model))
    ones = torch.ones(1, 3)
    expected = copied(ones)
    assert paths.rescale_between_blocks(copied, ones) is not None
    found = copied(ones)
    torch.testing.assert_close(found / found.sum(), expected / expected.sum())
    data = [(torch.randn(2, 3), torch.tensor([0, 1]))]
    assert prune(model, data, "synflow", 0.5, options={"rounds": 2}).card["effective_density"] > 0


def test_a_criterion_without_scores_says_so_in_one_line() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.head(x.flatten(1)) / 0.0

    model = Named(forward, head=nn.Linear(3, 2))
    data = [(torch.randn(2, 3, 1, 1), torch.tensor([0, 1]))]
    with pytest.raises(UsageError, match=r"synflow has no scores for Named, .* is not finite") as e:
        prune(model, data, "synflow", 0.5)
    assert "\n" not in str(e.value)


# Stand-ins


def test_same_padding_stays_with_the_pool_that_stands_in() -> None:
    model = nn.Sequential(MaxPool2dSame(3, 2), nn.MaxPool2d(3, 2, 1))
    images = torch.rand(1, 2, 7, 7)
    paths.only_paths(model)
    assert type(model[0]) is AvgPool2dSame and type(model[1]) is nn.AvgPool2d
    assert torch.equal(model[0](images), AvgPool2dSame(3, 2)(images))


def test_activations_that_overwrite_do_not_in_a_copy() -> None:
    """Behind a norm that is taken out they would overwrite the shortcut."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Hardswish(inplace=True))
    copied = paths.without_shifts(model, {})
    assert not copied[1].inplace and not copied[2].inplace
    assert model[1].inplace


# What says that a model cannot be followed, and what does not


def scores_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, int]]:
    scores = {name: torch.rand(each.shape) for name, each in zoo.prunable(model).items()}
    return scores, {name: max(each.numel() // 2, 1) for name, each in scores.items()}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate"
                     " memory: you tried to allocate 400 bytes."),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        MemoryError(),
    ],
    ids=["gpu", "cpu", "device", "python"],
)  # fmt: skip
def test_memory_that_runs_out_does_not_change_the_algorithm(error, monkeypatch) -> None:
    model, images = chain(3, 4, 2), torch.ones(2, 3, 1, 1)

    def fail(*_: object) -> Tensor:
        raise error

    monkeypatch.setattr(nn.Linear, "forward", fail)
    scores, counts = scores_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for attempt in (
            lambda: reach.best_on_paths(model, scores, counts, (3, 1, 1)),
            lambda: prune(model, [(images, torch.tensor([0, 1]))], "magnitude", 0.5),
        ):
            with pytest.raises(type(error)) as raised:
                attempt()
            assert raised.value is error


def test_our_own_mistakes_are_not_taken_for_models_that_cannot_be_followed(monkeypatch) -> None:
    model = chain(3, 4, 2)
    monkeypatch.setattr(reach._Layer, "thin", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        reach.best_on_paths(model, *scores_of(model), (3, 1, 1))


def unfollowed() -> nn.Module:
    """Reads a norm's weight by hand, which the stand-in has not."""
    return Named(
        lambda net, x: net.head(functional.layer_norm(x.flatten(1), (3,), net.norm.weight)),
        norm=nn.LayerNorm(3), head=nn.Linear(3, 4),
    )  # fmt: skip


def particular() -> nn.Module:
    """Asserts, as some of timm's do, what is not so once norms are gone."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        assert type(net.norm) is nn.LayerNorm, "a norm is wanted"
        return net.head(net.norm(x.flatten(1)))

    return Named(forward, norm=nn.LayerNorm(3), head=nn.Linear(3, 4))


@pytest.mark.parametrize(
    ("make", "error"), [(unfollowed, "AttributeError"), (particular, "AssertionError")]
)
def test_the_card_says_where_weights_were_chosen_without_paths(make, error: str) -> None:
    data = [(torch.randn(4, 3, 1, 1), torch.arange(4))]
    with pytest.warns(UserWarning, match="cannot be followed"):
        card = prune(make(), data, "autos", 0.5, selection=Selection()).card
    assert error in card["chosen_without_paths"]
    assert card["paths"].startswith(f"cannot be followed: Named without norms: {error}")
    assert "effective_density" not in card


# Precision


def flags() -> list:
    return [
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,
        torch.backends.cudnn.rnn.fp32_precision,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.is_autocast_enabled("cpu"),
    ]


EXACT = ["ieee", "ieee", "ieee", True, False, False]


def test_equality_is_judged_in_full_precision(monkeypatch) -> None:
    seen, gradients_of = [], reach.PathNetwork.gradients

    def noting(network: reach.PathNetwork, image: int = 0) -> dict[str, Tensor]:
        seen.append(flags())
        return gradients_of(network, image)

    monkeypatch.setattr(reach.PathNetwork, "gradients", noting)
    matmul, usual = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    before = flags()
    assert before != EXACT
    model = chain(3, 4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reach.live(model, ones_for(model), (3, 1, 1))
    assert seen == [EXACT, EXACT]
    seen.clear()
    reach.thinned(model, *scores_of(model), (3, 1, 1), rounds=1)
    assert seen[-4:] == [EXACT] * 4  # The two looks that tell the dead; rounds go by sums.
    assert flags() == before
    with pytest.raises(KeyError), numerics.exactly(torch.device("cpu")):
        raise KeyError
    assert flags() == before
    matmul.fp32_precision = usual


# What modules cache


class Caching(nn.Module):
    """As LeViT's attention: in eval mode it keeps what it made of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.biases, self.cache = nn.Parameter(torch.randn(4)), {}
        self.layer = nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        if "it" not in self.cache:
            self.cache["it"] = self.biases * 2
        self.last = self.layer(images.flatten(1)) + self.cache["it"]
        return self.last


@pytest.mark.parametrize("training", [True, False])
def test_nothing_that_was_cached_is_left_behind(training: bool) -> None:
    from autosparse.criteria.config import ScoringConfig

    model = Caching().train(training)
    data = [(torch.randn(4, 3, 1, 1), torch.arange(4))]
    prune(model, data, "snip", 0.5, scoring=ScoringConfig(mode="eval"))
    assert model.cache == {} and not hasattr(model, "last")
    assert model.training is training
    copy.deepcopy(model)


def test_a_model_that_holds_tensors_with_a_graph_is_pruned() -> None:
    model = Caching().eval()
    data = [(torch.randn(4, 3, 1, 1), torch.arange(4))]
    model(data[0][0])
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    held = model.cache["it"]
    assert prune(model, data, "synflow", 0.5, options={"rounds": 2}).kept == 6
    assert model.cache["it"] is held


class Indexing(nn.Module):
    """As ConViT's attention: a buffer is put in the place of another once the size is known."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.register_buffer("places", torch.zeros(1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if len(self.places) != images.shape[1]:
            self.places = torch.arange(images.shape[1]) + 1.0
        return self.layer(images.flatten(1) * self.places)


def test_a_buffer_that_was_put_in_anothers_place_is_taken_out_again() -> None:
    """Copied into it, the old values (one zero) would have made all places zero."""
    model, images = Indexing(), torch.randn(4, 3, 1, 1)
    before = model.places
    ticket = prune(model, [(images, torch.arange(4))], "snip", 0.5)
    assert model.places is before
    assert torch.equal(model(images), model.layer(images.flatten(1) * torch.tensor([1.0, 2, 3])))
    assert "level" not in ticket.card


# Models as timm makes them, from the command line's side


def test_a_resnet_made_here_needs_no_revealing() -> None:
    card = prune(make_model("test_resnet"), [(torch.randn(4, 1, 16, 16), torch.arange(4))], "snip",
                 0.9).card  # fmt: skip
    assert "revealed" not in card and "dead" not in card
