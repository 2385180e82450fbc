"""Slimming before training: by hand, and the same training as without, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from autosparse import slim_for_training
from autosparse.core.errors import RunFailed, UsageError, UserError
from autosparse.models.zoo import prunable
from autosparse.sparsity import masks
from autosparse.sparsity.ticket import Ticket, compact
from autosparse.training.config import TrainingConfig
from autosparse.training.steppers import PlainStepper
from tests.conftest import few

pytestmark = pytest.mark.usefixtures("one_thread")

ADAM = TrainingConfig(
    epochs=1, batch_size=8, warmup_epochs=0, weight_decay=0.1, clip_grad=0.5, ema=0.9
)
SGD = replace(ADAM, optimizer="sgd", learning_rate=0.05, optimizer_options={"momentum": 0.9})
NETS = ["test_byobnet", "test_vit", "test_resnet", "test_efficientnet", "test_convnext"]


def net(name: str) -> nn.Module:
    options: dict[str, Any] = {"img_size": 32, "patch_size": 8} if "vit" in name else {}
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
    model: nn.Module, ticket: Ticket, config: TrainingConfig, steps: int = 4
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
                value[moved], other[name][moved], rtol=1e-12, atol=1e-12, msg=name
            )
    return left


# By Adam where no gradient is zero but for rounding, of which it would make steps: a shift before
# another batch norm.
@pytest.mark.parametrize(
    ("name", "config"),
    few(
        [*((name, SGD) for name in NETS), ("test_vit", ADAM)],
        [("test_byobnet", SGD), ("test_vit", ADAM)],
    ),
    ids=lambda each: each if isinstance(each, str) else each.optimizer,
)
def test_training_is_the_same_and_the_network_smaller(name: str, config: TrainingConfig) -> None:
    start = random_ticket(net(name), 0.99)
    small = slim_for_training(net(name), start, (3, 32, 32))
    assert size(small.model) < 0.9 * size(net(name))
    ours, losses = trained(small.model, small.ticket, config)
    theirs, expected = trained(net(name), start, config)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    whole = small.whole(ours)
    assert same(whole, theirs, start)
    assert whole.card == {"note": "trained"}
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    one, other = (compact(net(name), each).eval()(images) for each in (whole, theirs))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_ticket_trained_in_another_precision_is_put_back() -> None:
    start = random_ticket(net("test_resnet").float(), 0.99)
    small = slim_for_training(net("test_resnet").float(), start, (3, 32, 32))
    values = {name: each.bfloat16() for name, each in small.ticket.values.items()}
    whole = small.whole(replace(small.ticket, values=values))
    assert {each.dtype for each in whole.values.values()} == {torch.bfloat16}
    assert all(torch.equal(each, start.values[n].bfloat16()) for n, each in whole.values.items())


def test_a_fault_shows_in_half_precision_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from autosparse.sparsity import slim_training as module

    def spoils(small: nn.Module, *_: object) -> None:
        with torch.no_grad():
            small.get_parameter("fc.weight").mul_(1.1)

    model = net("test_resnet").bfloat16()
    start = random_ticket(model, 0.5)
    slim_for_training(model, start, (3, 32, 32))
    monkeypatch.setattr(module, "_tell_layers", spoils)
    with pytest.raises(RunFailed, match="changed a logit"):
        slim_for_training(model, start, (3, 32, 32))


def two_layers(second: list[list[float]]) -> tuple[nn.Sequential, Ticket]:
    """Two pixels, four hidden units, two classes; the first two units have no weight of their own.

    All that is kept of the second layer is said by `second`.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)
    )
    first = torch.tensor([[False, False], [False, False], [True, False], [True, True]])
    chosen = {"1.weight": first, "4.weight": torch.tensor(second) > 0}
    return model, Ticket.from_model(model, chosen, {})


def test_by_hand() -> None:
    # Nobody reads the second and the last unit. The first has no weights, and stays as it is read.
    model, start = two_layers([[1, 0, 0, 0], [1, 0, 1, 0]])
    small = slim_for_training(model, start, (1, 1, 2))
    assert [tuple(each.shape) for each in small.model.parameters()] == [
        (2, 2), (2,), (2,), (2,), (2, 2), (2,),
    ]  # fmt: skip
    assert (small.model[1].out_features, small.model[2].num_features) == (2, 2)
    assert small.ticket.masks["1.weight"].tolist() == [[False, False], [True, False]]
    assert small.ticket.rest["1.bias"].equal(start.rest["1.bias"][[0, 2]])
    assert model[1].out_features == 4
    assert small.model.training
    moved = {name: value + 1 for name, value in small.ticket.values.items()}
    biases = {name: value + 1 for name, value in small.ticket.rest.items()}
    whole = small.whole(replace(small.ticket, values=moved, rest=biases))
    whole.check(model)
    assert whole.fingerprint == start.fingerprint
    # The weights of the last unit are kept, and as they were.
    assert (whole.values["1.weight"] - start.values["1.weight"]).round(decimals=4).tolist() == [
        1, 0, 0,
    ]  # fmt: skip
    difference = whole.rest["2.running_mean"] - start.rest["2.running_mean"]
    assert difference.tolist() == [1, 0, 1, 0]
    assert (whole.values["4.weight"] - start.values["4.weight"]).round(decimals=4).eq(1).all()


def test_a_kept_weight_of_zero_is_read_by() -> None:
    model, _ = two_layers([[1, 1, 1, 1]] * 2)
    nn.init.zeros_(model[4].weight)
    chosen = {"1.weight": torch.ones(4, 2).bool(), "4.weight": torch.ones(2, 4).bool()}
    small = slim_for_training(model, Ticket.from_model(model, chosen, {}), (1, 1, 2))
    assert size(small.model) == size(model)


def test_a_weight_that_two_layers_share() -> None:
    torch.manual_seed(0)
    layers = [(4, 5), (5, 5), (5, 5), (5, 2)]
    model = nn.Sequential(nn.Flatten(), *[nn.Linear(*each) for each in layers])
    model[3].weight = model[2].weight
    chosen = {name: torch.zeros(weight.shape).bool() for name, weight in prunable(model).items()}
    chosen["1.weight"][:, 0] = chosen["2.weight"][1, :2] = chosen["4.weight"][:, 1] = True
    start = Ticket.from_model(model, chosen, {})
    small = slim_for_training(model, start, (1, 2, 2))
    assert small.model[3].weight is small.model[2].weight
    assert small.ticket.masks["2.weight"].tolist() == [[False, False], [True, True]]
    assert small.ticket.masks["1.weight"].shape == (2, 4)
    network = compact(small.model, small.ticket)
    whole = small.whole(Ticket.from_compact(network, small.ticket, {}))
    assert whole.content_hash == start.content_hash


class Counting(nn.Sequential):
    """A network that says another thing if it has fewer units."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self[1].out_features


class Growing(nn.Sequential):
    """A network that does not run with fewer units."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + torch.ones(4).view(self[1].out_features, 1).sum()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Counting, "slimming Counting changed a logit by .*; train it without training.slim$"),
        (Growing, "^Growing counts on its number of units, .*; train it without training.slim$"),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_a_network_whose_python_counts_units(kind: type, said: str, scale: float) -> None:
    model, start = two_layers([[1, 0, 0, 0], [1, 0, 1, 0]])
    state = start.dense_state()  # Its logits are small, too.
    model[4].load_state_dict({name: scale * state[f"4.{name}"] for name in ("weight", "bias")})
    start = Ticket.from_model(model, start.masks, {})
    with pytest.raises(UserError, match=said):
        slim_for_training(kind(*model), start, (1, 1, 2))
    assert model[1].out_features == 4


def test_masks_that_have_moved_do_not_go_back() -> None:
    model, start = two_layers([[1, 0, 0, 0], [1, 0, 1, 0]])
    small = slim_for_training(model, start, (1, 1, 2))
    with pytest.raises(ValueError, match="masks have changed"):
        small.whole(start)


def test_images_that_nothing_tells_the_shape_of() -> None:
    with pytest.raises(UsageError, match="give the `shape` of one"):
        slim_for_training(*two_layers([[1, 1, 1, 1]] * 2))
