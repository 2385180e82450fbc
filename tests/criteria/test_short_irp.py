"""Short-horizon IRP: by hand, and against masked-dense training written out."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from autosparse import criteria
from autosparse.core.errors import RunFailed, UsageError
from autosparse.criteria.short_irp import LABELS
from autosparse.models.gradients import counting
from tests.criteria.plain import Batches, densities, flat, highest

short_irp = criteria.get("short_irp")
NAMES = ("0.weight", "3.weight")


def four_weights() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, -2.0, 0.5, -0.6]])
    return model


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().mean()


ONES = [(torch.ones(1, 4), torch.tensor([[-5.0]]))]
ONE_STEP = {"steps_per_level": 1, "learning_rate": 0.1, "weight_decay": 0.5}


@pytest.fixture()
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A list that gets the weights as every level leaves them, as they are ranked."""
    seen: list[Tensor] = []

    def magnitude(weight: Tensor) -> Tensor:
        seen.append(weight)
        return weight.abs()

    monkeypatch.setitem(LABELS, "magnitude", magnitude)
    return seen


def test_by_hand(trained: list[Tensor]) -> None:
    # The first step of AdamW is w * (1 - 0.1 * 0.5) - 0.1 * sign of the gradient; the output is
    # above the target of -5, so all signs are +: 0.85, -2, 0.375, -0.67.
    found = short_irp(four_weights(), ONES, squared_error, sparsity=0.5, levels=1, **ONE_STEP)
    expected = torch.tensor([[0.85, -2.0, 0.375, -0.67]])
    torch.testing.assert_close(trained[0], expected, rtol=1e-5, atol=0)
    assert found["0.weight"].tolist() == [[True, True, False, False]]


def test_levels_and_rewinding_by_hand(trained: list[Tensor]) -> None:
    # A quarter in two levels: 2 of 4, then 1. The first level keeps 0.85 and 2 (above). The second
    # starts again from 1 and -2 (not from 0.85), says -1 > -5, and so ends at 0.85 and -2 again.
    found = short_irp(four_weights(), ONES, squared_error, sparsity=0.75, levels=2, **ONE_STEP)
    expected = torch.tensor([[0.85, -2.0, 0.0, 0.0]])
    torch.testing.assert_close(trained[1], expected, rtol=1e-5, atol=0)
    assert found["0.weight"].tolist() == [[False, True, False, False]]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 3))


def data(*sizes: int) -> Batches:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, 6, generator=generator),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for size in sizes
    ]


def masked_dense(
    model: nn.Module, batches: Batches, sparsity: float, levels: int, steps: int
) -> Tensor:
    """Lottery-ticket rewinding with masks: what is left in the end, all layers end to end."""
    model = model.train()
    own = [model.get_parameter(name) for name in NAMES]
    mask = torch.ones(sum(weight.numel() for weight in own), dtype=torch.bool)
    for count in densities(len(mask), sparsity, levels):
        parts = mask.split([weight.numel() for weight in own])
        masks = [part.view_as(weight) for part, weight in zip(parts, own, strict=True)]
        network = copy.deepcopy(model)
        weights = [network.get_parameter(name) for name in NAMES]
        others = [p for name, p in network.named_parameters() if name not in NAMES]
        optimizer = torch.optim.AdamW(
            [{"params": weights, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}],
            lr=0.02,
        )
        for number in range(steps):
            with torch.no_grad():
                for weight, alive in zip(weights, masks, strict=True):
                    weight.mul_(alive)
            pixels, labels = batches[number % len(batches)]
            optimizer.zero_grad()
            cross_entropy(network(pixels), labels).backward()
            for weight, alive in zip(weights, masks, strict=True):
                weight.grad.mul_(alive)
            optimizer.step()
        found = [weight.detach().abs() for weight in weights]
        mask = highest(found, count, mask)
    return mask


@pytest.mark.parametrize(
    ("sparsity", "levels", "steps"), [(0.0, 1, 3), (0.5, 1, 7), (0.8, 3, 8), (0.9, 4, 5)]
)
def test_against_masked_dense_training(sparsity: float, levels: int, steps: int) -> None:
    # Three batches: the list starts anew when it is used up, and with every level.
    batches = [(pixels.double(), labels) for pixels, labels in data(8, 5, 7)]
    found = short_irp(
        net().double(), batches, cross_entropy, sparsity=sparsity, levels=levels,
        steps_per_level=steps, learning_rate=0.02, weight_decay=0.3,
    )  # fmt: skip
    expected = masked_dense(net().double(), batches, sparsity, levels, steps)
    assert torch.equal(flat(found), expected)


def test_weights_that_are_not_prunable_are_trained_too(trained: list[Tensor]) -> None:
    options = {"sparsity": 0.5, "levels": 1, "steps_per_level": 5, "learning_rate": 0.02}
    some = short_irp(net(), data(8), cross_entropy, exclude=("3",), **options)
    assert list(some) == ["0.weight"]
    assert some["0.weight"].sum() == 36
    frozen = net()
    frozen[3].requires_grad_(False)
    short_irp(frozen, data(8), cross_entropy, exclude=("3",), **options)
    assert not torch.allclose(trained[0], trained[1])


def test_the_seed_fixes_dropout(trained: list[Tensor]) -> None:
    model = net()
    model.insert(3, nn.Dropout(0.5))
    for seed in (0, 0, 1):
        short_irp(
            model, data(8), cross_entropy, sparsity=0.5, levels=1, steps_per_level=3, seed=seed
        )
    first, again, other = (torch.cat([x.flatten() for x in trained[k : k + 2]]) for k in (0, 2, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_optimizer_can_be_another(trained: list[Tensor]) -> None:
    # timm's sgd is Nesterov's with momentum 0.9: a first step of 0.1 * 1.9 * gradient. The output
    # is -1.1 and the target -5, so that the gradient is 3.9 for each: 0.741 off every weight.
    short_irp(
        four_weights(), ONES, squared_error, sparsity=0.0, levels=1, steps_per_level=1,
        learning_rate=0.1, weight_decay=0.0, optimizer="sgd",
    )  # fmt: skip
    torch.testing.assert_close(trained[0], torch.tensor([[1.0, -2.0, 0.5, -0.6]]) - 0.741)


def test_an_endless_stream_is_read_anew_at_every_level() -> None:
    batches = data(8, 5, 7)

    class Stream:
        started = 0

        def __iter__(self):
            self.started += 1
            while True:
                yield from batches

    stream = Stream()
    options = {"sparsity": 0.8, "levels": 3, "steps_per_level": 4}
    found = short_irp(net(), stream, cross_entropy, **options)
    assert stream.started == 3
    assert torch.equal(flat(found), flat(short_irp(net(), batches, cross_entropy, **options)))


def test_cost() -> None:
    # Five steps take 8 + 5 + 7 + 8 + 5 images.
    with counting() as cost:
        short_irp(net(), data(8, 5, 7), cross_entropy, sparsity=0.5, levels=3, steps_per_level=5)
    assert cost.image_passes == 3 * 33


@pytest.mark.parametrize("option", [{"levels": 0}, {"steps_per_level": 0}])
def test_it_needs_a_level_and_a_step(option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="levels and steps_per_level must be at least 1"):
        short_irp(net(), data(8), cross_entropy, sparsity=0.5, **option)


def test_an_unknown_optimizer() -> None:
    with pytest.raises(UsageError, match="unknown optimizer 'adamx'"):
        short_irp(net(), data(8), cross_entropy, sparsity=0.5, optimizer="adamx")


def test_no_batch() -> None:
    with pytest.raises(UsageError, match="short_irp needs data"):
        short_irp(net(), [], cross_entropy, sparsity=0.5)


def test_a_loss_that_is_not_finite() -> None:
    with pytest.raises(RunFailed, match=r"not finite; lower options\.learning_rate"):
        short_irp(
            four_weights(), ONES, squared_error,
            sparsity=0.0, levels=1, steps_per_level=60, learning_rate=1e6, optimizer="sgd",
        )  # fmt: skip


def test_an_iterator_is_rewound_too() -> None:
    batches, found = data(8, 5, 7), []
    for each in (batches, iter(batches)):
        options = {"sparsity": 0.5, "levels": 2, "steps_per_level": 3}
        found.append(short_irp(net(), each, cross_entropy, **options))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# Models and batches of all kinds


class Watched(nn.Module):
    """Keeps its last output, which has a graph, and notes in which modes it is called."""

    modes: ClassVar[list[bool]] = []

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.last = self.layer(torch.ones(1, 4))

    def forward(self, inputs: Tensor) -> Tensor:
        Watched.modes.append(self.training)
        self.last = self.layer(inputs)
        return self.last


def test_a_model_that_keeps_a_tensor_with_a_graph_is_trained_in_train_mode() -> None:
    batch = (torch.randn(4, 4), torch.arange(4) % 3)
    options = {"sparsity": 0.5, "levels": 2, "steps_per_level": 2}
    short_irp(Watched(), [batch], cross_entropy, training_mode=False, **options)
    assert Watched.modes == [True] * 4


def test_a_loader_that_shuffles_gives_every_level_the_same_order() -> None:
    seen: list[int] = []

    def loss_fn(outputs: Tensor, labels: Tensor) -> Tensor:
        seen.extend(labels.tolist())
        return cross_entropy(outputs, labels)

    samples = [(torch.randn(4), label) for label in range(16)]
    loader = DataLoader(samples, batch_size=4, shuffle=True)  # type: ignore[arg-type]
    options = {"sparsity": 0.9, "levels": 3, "steps_per_level": 6}
    short_irp(nn.Linear(4, 16), loader, loss_fn, **options)
    assert seen[:24] == seen[24:48] == seen[48:]
    assert seen[:16] != sorted(seen[:16])
