"""Slimming before training: by hand, and the same training as without, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn

from autosparse import slim_for_training
from autosparse.core.errors import UsageError
from autosparse.models.zoo import prunable
from autosparse.sparsity import masks
from autosparse.sparsity.ticket import Ticket, compact
from autosparse.training.config import TrainingConfig
from autosparse.training.steppers import PlainStepper
from tests.conftest import few

pytestmark = pytest.mark.usefixtures("one_thread")

TRAINING = TrainingConfig(
    epochs=1, batch_size=8, warmup_epochs=0, weight_decay=0.1, clip_grad=0.5, ema=0.9
)
NETS = ["test_byobnet", "test_vit", "test_resnet", "test_efficientnet", "test_convnext"]


def net(name: str) -> nn.Module:
    options = {"img_size": 32, "patch_size": 8} if "vit" in name else {}
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **options).double()


def random_ticket(model: nn.Module, sparsity: float) -> Ticket:
    generator = torch.Generator().manual_seed(0)
    scores = {
        name: torch.rand(weight.shape, generator=generator)
        for name, weight in prunable(model).items()
    }
    return Ticket.from_model(model, masks.from_scores(scores, sparsity), {})


def trained(
    model: nn.Module, ticket: Ticket, steps: int = 4, config: TrainingConfig = TRAINING
) -> tuple[Ticket, list[Tensor]]:
    """Train with decay, clipping and a moving average; return the ticket, and the losses."""
    network = compact(model, ticket).train()
    stepper = PlainStepper(network, config, steps)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        images = torch.randn(8, 3, 32, 32, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 5, (8,), generator=generator)
        losses.append(stepper.step(images, labels))
    average = {name: each.clone() for name, each in stepper.state_dict().items()}
    return Ticket.from_compact(network, ticket, {"note": "trained"}, average), losses


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def same(ours: Ticket, theirs: Ticket, start: Ticket) -> int:
    """Hold values equal to rounding, but for those that stayed at the start; return how many."""
    left = 0
    assert ours.fingerprint == theirs.fingerprint == start.fingerprint
    for part in ("values", "rest"):
        mine, other, first = (getattr(each, part) for each in (ours, theirs, start))
        assert list(mine) == list(other)
        for name, value in mine.items():
            moved = value != first[name]
            left += int((~moved).sum())
            torch.testing.assert_close(
                value[moved], other[name][moved], rtol=1e-10, atol=1e-12, msg=name
            )
    return left


@pytest.mark.parametrize("name", few(NETS, ["test_byobnet", "test_vit"]))
def test_training_is_the_same_and_the_network_smaller(name: str) -> None:
    start = random_ticket(net(name), 0.99)
    small = slim_for_training(net(name), start, (3, 32, 32))
    assert size(small.model) < 0.9 * size(net(name))
    ours, losses = trained(small.model, small.ticket)
    theirs, expected = trained(net(name), start)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    whole = small.whole(ours)
    assert same(whole, theirs, start)
    assert whole.card == {"note": "trained"}
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    one, other = (compact(net(name), each).eval()(images) for each in (whole, theirs))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
