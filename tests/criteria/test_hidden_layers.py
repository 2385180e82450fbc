"""Models as they start: layers behind gains and heads at or near zero are scored all the same."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
from torch import Tensor, nn

from autosparse import criteria, prune
from autosparse.models import zoo
from autosparse.models.config import ModelConfig
from autosparse.sparsity import masks
from autosparse.sparsity.ticket import Ticket
from tests.conftest import few
from tests.sparsity.test_reach import Named

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 32


def batches(channels: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, channels, SIDE, SIDE, generator=generator), torch.arange(8) % 4)]


def as_timm_makes_it(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=4, **options)


def with_gains_of_one(model: nn.Module, names: list[str]) -> nn.Module:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            twin.get_parameter(name).fill_(1)
    return twin


def pruned(model: nn.Module, criterion: str, sparsity: float = 0.95, **options) -> Ticket:
    """Prune without any warning, and with the model as it was before."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ticket = prune(model, batches(), criterion, sparsity, options=options)
    assert all(torch.equal(model.state_dict()[name], each) for name, each in before.items())
    return ticket


@pytest.mark.parametrize("criterion", ["snip", "grasp", "synflow"])
def test_a_resnet_whose_last_norms_start_at_zero(criterion: str) -> None:
    """Wanted by hand: the ticket of the same network with those norms at one."""
    model = as_timm_makes_it("test_resnet")
    zeros = [n for n, p in model.named_parameters() if "bn" in n and "weight" in n and not p.any()]
    assert len(zeros) >= 4
    options = {"rounds": 5} if criterion == "synflow" else {}
    ticket = pruned(model, criterion, **options)
    assert ticket.card["revealed"] == sorted(zeros)
    expected = pruned(with_gains_of_one(model, zeros), criterion, **options)
    assert ticket.fingerprint == expected.fingerprint
    assert "revealed" not in expected.card
    # Hidden, whole layers kept one weight, and the first were kept whole.
    kept = {name: int(mask.sum()) for name, mask in ticket.masks.items()}
    assert list(kept.values()).count(1) <= (2 if criterion == "synflow" else 0)
    assert all(kept[name] < mask.numel() for name, mask in ticket.masks.items())
    assert torch.equal(ticket.rest[zeros[0]], torch.zeros_like(ticket.rest[zeros[0]]))


@pytest.mark.parametrize(
    ("name", "options"),
    few(
        [("test_convnext", {}), ("test_vit2", {"img_size": SIDE, "patch_size": 8})],
        [("test_convnext", {})],
    ),
)
def test_layer_scale_near_zero(name: str, options: dict) -> None:
    model = as_timm_makes_it(name, **options)
    scales = [n for n, p in model.named_parameters() if p.ndim == 1 and 0 < p.abs().max() < 1e-4]
    ticket = pruned(model, "snip")
    assert scales and ticket.card["revealed"] == sorted(scales)
    expected = pruned(with_gains_of_one(model, scales), "snip")
    assert ticket.fingerprint == expected.fingerprint


def test_a_scalar_that_starts_at_zero() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        return net.head(x + net.alpha * net.branch(x))

    model = Named(forward, branch=nn.Linear(3, 3), head=nn.Linear(3, 4))
    model.alpha = nn.Parameter(torch.zeros(()))
    ticket = pruned(model, "snip", 0.5)
    assert ticket.card["revealed"] == ["alpha"]
    assert ticket.masks["branch.weight"].sum() > 1


def test_a_head_that_starts_at_zero_is_drawn_for_a_while() -> None:
    """Else the head scores zero by its weights, and all else by the head."""
    model = as_timm_makes_it("test_resnet", zero_init_last=False)
    nn.init.zeros_(model.get_classifier().weight)
    ticket = pruned(model, "snip")
    assert ticket.card["revealed"] == ["fc.weight"]
    assert 1 < ticket.masks["fc.weight"].sum() < ticket.masks["fc.weight"].numel()
    assert not ticket.values["fc.weight"].any()
    again = pruned(model, "snip")
    assert again.fingerprint == ticket.fingerprint


def test_what_is_made_by_its_recipe_is_scored_as_it_is() -> None:
    config = ModelConfig("test_convnext")
    model = zoo.create(config, num_classes=4, in_chans=3, image_size=SIDE, seed=0)
    ticket = prune(model, batches(), "snip", 0.9)
    assert "revealed" not in ticket.card
    scores = criteria.get("snip")(model, batches(), nn.functional.cross_entropy)
    expected = masks.from_scores(scores, 0.9)
    assert masks.fingerprint(expected) == ticket.fingerprint


@pytest.mark.slow
def test_autos_sees_gains_as_it_did_when_it_was_fitted() -> None:
    """What is near zero stays so, what is zero is one: as models.create makes networks."""
    config = ModelConfig("test_convnext")
    made = zoo.create(config, num_classes=4, in_chans=3, image_size=SIDE, seed=0)
    own = as_timm_makes_it("test_convnext")
    own.load_state_dict(made.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = (prune(each, batches(), "autos", 0.9) for each in (made, own))
    assert ours.fingerprint == theirs.fingerprint
    assert "revealed" not in theirs.card


# Ties, and layers that say nothing


def test_ties_are_told_and_counted() -> None:
    """Twelve weights, six distinct: at 50 % the threshold falls on six equal ones."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[9.0, 8, 7, 6], [1, 1, 1, 1]]))
        model[2].weight.copy_(torch.tensor([[1.0, 1], [0.5, 0.25]]))
    with pytest.warns(UserWarning, match=r"^6 weights have the very score .* \(6 are kept\)"):
        ticket = prune(model, [(torch.randn(2, 4, 1, 1), torch.tensor([0, 1]))], "magnitude", 0.5)
    assert ticket.card["ties"] == 6 and ticket.kept == 6


def test_ties_by_hand() -> None:
    scores = {"a": torch.tensor([3.0, 1, 1, 0]), "b": torch.tensor([1.0, 0.5, 1])}
    together = masks.from_scores(scores, 4 / 7)  # Keeps 3, 1, 1 of four that are 1.
    assert masks.ties(scores, together, by_layer=False) == 4
    between = masks.keep(scores, 5)  # All of those: no tie.
    assert masks.ties(scores, between, by_layer=False) == 0
    each = masks.keep_counts(scores, {"a": 2, "b": 2})
    assert masks.ties(scores, each, by_layer=True) == 2
    guarded = {"a": torch.tensor([True, False]), "b": torch.tensor([True, False])}
    values = {"a": torch.tensor([9.0, 5]), "b": torch.tensor([1.0, 0])}  # b's best is raised.
    assert masks.ties(values, guarded, by_layer=False) == 0


def test_a_layer_that_hears_nothing_is_named() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.head(x.mean((2, 3))) + 0 * net.unheard(x.mean((2, 3)))

    model = Named(forward, head=nn.Linear(3, 4), unheard=nn.Linear(3, 4))
    with pytest.warns(UserWarning, match=r"the same score in 1 of 2 layers \(unheard.weight\)"):
        ticket = prune(model, batches(), "snip", 0.5)
    assert ticket.card["level"] == ["unheard.weight"]
