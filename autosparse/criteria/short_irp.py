"""Short-horizon IRP: iterative rewind pruning with a few steps of training per level.

Lottery-ticket rewinding (J. Frankle & M. Carbin, ICLR 2019, arXiv 1803.03635; see irp/run.py) with
short trainings: every level trains the subnetwork from its initial weights for `steps_per_level`
steps at a constant learning rate, ranks what is left by magnitude (or LAMP, which compares layers
better), prunes, and rewinds weights, optimizer and the order of batches. No paper has this method;
docs/results/log.md has figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from autosparse.core.errors import RunFailed, UsageError, unknown
from autosparse.criteria.base import Masks, Scores, register
from autosparse.criteria.lamp import layer_scores
from autosparse.criteria.rounds import counts
from autosparse.models.gradients import Batch, Batches, spend
from autosparse.models.restore import copied
from autosparse.models.zoo import device_of
from autosparse.sparsity import masks
from autosparse.sparsity.compact import densify
from autosparse.sparsity.counts import keep_density
from autosparse.sparsity.ticket import Ticket, compact
from autosparse.training.config import TrainingConfig
from autosparse.training.steppers import PlainStepper

LABELS = {"magnitude": torch.abs, "lamp": layer_scores}
"""Label -> function of a layer's trained weights."""


@register("short_irp", needs_data=True, trains=True, chooses=True)
def short_irp(
    model,
    parameters,
    batches,
    loss_fn,
    *,
    sparsity: float,
    levels: int = 7,
    steps_per_level: int = 200,
    batch_size: int = 64,
    optimizer: str = "adamw",
    learning_rate: float = 1e-2,
    weight_decay: float = 0.05,
    label: str = "magnitude",
    seed: int = 0,
) -> Masks:
    """Return the masks of the last level.

    Args:
        sparsity: fraction of weights to remove in the end.
        levels: how often the network is pruned; the density falls exponentially.
        steps_per_level: of training, from the initial weights.
        batch_size: images per step, where the training data are named (see `prune`).
        optimizer: any of timm's factory.
        learning_rate: constant.
        weight_decay: as in training: not on biases and norms.
        label: what ranks the trained weights: magnitude or lamp.
        seed: fixes dropout, and the order in which a loader shuffles by torch's own generator.
    """
    if label not in LABELS:
        raise unknown("label", label, LABELS)
    config = TrainingConfig(
        optimizer=optimizer, learning_rate=learning_rate, weight_decay=weight_decay, schedule="none"
    )

    def best(trained: Scores, alive: Masks, count: int) -> Masks:
        scores = {name: LABELS[label](weight) for name, weight in trained.items()}
        return masks.keep(scores, count, within=alive)

    horizon = Horizon(sparsity, levels, steps_per_level, config, seed)
    return short_levels(model, batches, loss_fn, horizon, best, masks.dense(parameters, "cpu"))


@dataclass(frozen=True)
class Horizon:
    """How many levels there are and how each is trained; see the arguments of `short_irp`."""

    sparsity: float
    levels: int
    steps: int
    training: TrainingConfig
    seed: int


Best = Callable[[Scores, Masks, int], Masks]
"""(trained weights on the CPU, masks, count) -> masks inside those that keep `count` weights."""


def short_levels(model, batches, loss_fn, horizon: Horizon, best: Best, alive: Masks) -> Masks:
    """Train, prune and rewind, level by level; return what is left, on the model's device.

    `alive` are the masks to begin with.
    """
    levels, steps = horizon.levels, horizon.steps
    if levels < 1 or steps < 1:
        raise UsageError("short levels: levels and steps_per_level must be at least 1")
    if iter(batches) is batches:
        batches = list(islice(batches, steps))
    alive = {name: mask.cpu() for name, mask in alive.items()}
    for count in _counts(alive, horizon):
        trained = _trained(model, alive, horizon, batches, loss_fn)
        alive = {name: mask.cpu() for name, mask in best(trained, alive, count).items()}
        del trained
    device = device_of(model)
    return {name: mask.to(device) for name, mask in alive.items()}


def _counts(alive: Masks, horizon: Horizon) -> list[int]:
    """Return how many weights each level keeps: exponentially fewer, beginning at the masks."""
    total, inside = masks.total(alive), masks.kept(alive)
    kept = list(counts(total, horizon.sparsity, horizon.levels))
    if inside == total:
        return kept
    ratio = kept[-1] / inside
    shares = (ratio ** (k / horizon.levels) for k in range(1, horizon.levels))
    falling = [keep_density(inside, share) for share in shares]
    return [*falling, kept[-1]]


def _trained(model: nn.Module, alive: Masks, horizon: Horizon, batches, loss_fn) -> Scores:
    """Return the subnetwork's weights, dense and on the CPU, after the steps of one level."""
    network = compact(copied(model), Ticket.from_model(model, alive, {})).train()
    stepper = PlainStepper(network, horizon.training, horizon.steps)
    device = device_of(network)
    stepper.recipe.hard = stepper.recipe.soft = loss_fn
    stepper.seed = horizon.seed
    loss = torch.zeros(())
    torch.manual_seed(horizon.seed)  # A loader that shuffles begins as at the level before.
    for images, labels in islice(endless(batches), horizon.steps):
        loss = stepper.step(images.to(device), labels.to(device))
        spend(len(labels))
    if not torch.isfinite(loss):
        raise RunFailed("short levels: the loss is not finite; lower options.learning_rate")
    dense = densify(network)
    return {name: dense.get_parameter(name).detach().cpu() for name in alive}


def endless(batches: Batches) -> Iterator[Batch]:
    """Yield the batches again and again; `batches` may be an endless stream."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise UsageError("short_irp needs data, and there is no batch")
