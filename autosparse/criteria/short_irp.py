"""Short-horizon IRP: iterative rewind pruning with a few steps of training per level.

Lottery-ticket rewinding (J. Frankle & M. Carbin, ICLR 2019, arXiv 1803.03635; see irp/run.py) with
its costly part cut short: every level trains the subnetwork from its initial weights for
`steps_per_level` steps at a constant rate, ranks what is left by magnitude (or LAMP, which
compares layers better), prunes, and rewinds weights, optimizer and the order of batches. It is no
paper's method; what was measured is in docs/results/log.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from autosparse.core.errors import RunFailed, UsageError, unknown
from autosparse.criteria.base import Scores, register
from autosparse.criteria.lamp import layer_scores
from autosparse.criteria.rounds import counts
from autosparse.models.gradients import Batch, Batches, spend
from autosparse.models.zoo import device_of
from autosparse.sparsity import masks
from autosparse.sparsity.compact import densify
from autosparse.sparsity.counts import keep_density
from autosparse.sparsity.ticket import Ticket, compact
from autosparse.training.config import TrainingConfig
from autosparse.training.steppers import PlainStepper

LABELS = {"magnitude": torch.abs, "lamp": layer_scores}
"""Label -> function of a layer's trained weights."""


@register("short_irp", needs_data=True, trains=True)
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
) -> Scores:
    """Return the trained label at the last level; weights that fell before score below zero.

    Args:
        sparsity: fraction of weights to remove in the end.
        levels: how often the network is pruned; the density falls exponentially.
        steps_per_level: of training, from the initial weights.
        batch_size: images per step, where the training data are named (see `prune`).
        optimizer: any of timm's factory.
        learning_rate: constant.
        weight_decay: as in training: not on biases and norms.
        label: what ranks the trained weights: magnitude or lamp.
        seed: fixes dropout.
    """
    if label not in LABELS:
        raise unknown("label", label, LABELS)
    config = TrainingConfig(
        optimizer=optimizer, learning_rate=learning_rate, weight_decay=weight_decay, schedule="none"
    )

    def ranked(trained: Scores, alive: masks.Masks, count: int) -> tuple[Scores, masks.Masks]:
        scores = {name: LABELS[label](weight) for name, weight in trained.items()}
        return scores, masks.keep(scores, count, within=alive)

    horizon = Horizon(sparsity, levels, steps_per_level, config, seed)
    alive = {name: torch.ones(each.shape, dtype=torch.bool) for name, each in parameters.items()}
    return short_levels(model, parameters, batches, loss_fn, horizon, ranked, alive)


@dataclass(frozen=True)
class Horizon:
    """How far short levels look: the arguments of `short_irp` that are no matter of ranking."""

    sparsity: float
    levels: int
    steps: int
    training: TrainingConfig
    seed: int


Ranked = Callable[[Scores, masks.Masks, int], tuple[Scores, masks.Masks]]
"""(trained weights, masks, count) -> (scores above -1, masks inside those that keep `count`)."""


def short_levels(
    model, parameters, batches, loss_fn, horizon: Horizon, ranked: Ranked, alive: masks.Masks
) -> Scores:
    """Go down the levels; return the last scores, and for what fell before, below those, when.

    `alive` are the masks to begin with.
    """
    levels, steps = horizon.levels, horizon.steps
    if levels < 1 or steps < 1:
        raise UsageError("short levels: levels and steps_per_level must be at least 1")
    if iter(batches) is batches:
        batches = list(islice(batches, steps))
    alive = {name: mask.cpu() for name, mask in alive.items()}
    fell = {name: torch.zeros(mask.shape, dtype=torch.int16) for name, mask in alive.items()}
    scores: Scores = {}
    for level, count in enumerate(_counts(alive, horizon), start=1):
        scores.clear()
        scores, smaller = ranked(
            _trained(model, alive, horizon.training, batches, steps, loss_fn, horizon.seed),
            alive,
            count,
        )
        smaller = {name: mask.cpu() for name, mask in smaller.items()}
        for name, mask in smaller.items():
            fell[name][alive[name] & ~mask] = level
        alive = smaller
    device = next(iter(parameters.values())).device
    return {
        name: torch.where(alive[name], scores[name], fell[name].float() - levels - 1).to(device)
        for name in parameters
    }


def _counts(alive: masks.Masks, horizon: Horizon) -> list[int]:
    """Return what each level keeps: the density falls exponentially from that of the masks."""
    total, inside = masks.total(alive), masks.kept(alive)
    found = list(counts(total, horizon.sparsity, horizon.levels))
    if inside == total:
        return found
    ratio = found[-1] / inside
    shares = (ratio ** (k / horizon.levels) for k in range(1, horizon.levels))
    falling = [keep_density(inside, share) for share in shares]
    return [*falling, found[-1]]


def _trained(
    model: nn.Module,
    alive: masks.Masks,
    config: TrainingConfig,
    batches,
    steps: int,
    loss_fn,
    seed: int,
) -> dict[str, Tensor]:
    """Return the weights, on the CPU, after `steps` steps of the subnetwork."""
    network = compact(copy.deepcopy(model), Ticket.from_model(model, alive, {}))
    stepper, device = PlainStepper(network, config, steps), device_of(network)
    stepper.recipe.hard = stepper.recipe.soft = loss_fn
    stepper.seed = seed
    loss = torch.zeros(())
    for images, labels in islice(_endless(batches), steps):
        loss = stepper.step(images.to(device), labels.to(device))
        spend(len(labels))
    if not torch.isfinite(loss):
        raise RunFailed("short levels: the loss is not finite; lower options.learning_rate")
    dense = densify(network)
    return {name: dense.get_parameter(name).detach().cpu() for name in alive}


def _endless(batches: Batches) -> Iterator[Batch]:
    """Yield the batches over and over; a stream may be endless by itself."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise UsageError("short_irp needs data, and there is no batch")
