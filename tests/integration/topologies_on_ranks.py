"""Called on two ranks: losses, masks, values and moments of topologies that move."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from autosparse import compact, prune
from autosparse.data import sets
from autosparse.data.sets import DataSource
from autosparse.integrations import deepspeed
from autosparse.integrations.deepspeed_values import KeptSharded
from autosparse.models import zoo
from autosparse.sparsity.compact import compact_weights
from autosparse.study.config import DeepSpeedConfig, SparseTrainConfig
from autosparse.training.steppers import History, Ranks
from tests.conftest import SMALL_DIGITS, make_model
from tests.integration.masked_dense import BATCH, CASES, batches

UPDATES, EVERY = 3, 3
STEPS = UPDATES * EVERY + 1


def settings(name: str, stage: int = 0, **changes: Any) -> SparseTrainConfig:
    """Return how a case is trained; `masked_rigl` takes the same training config."""
    case = CASES[name]
    changes = {"topology": "rigl", **changes}
    training = replace(
        case.settings(), ema=0.0, epochs=1, sparse_products=False,
        topology_every=EVERY, topology_until=1.0, **changes,
    )  # fmt: skip
    return SparseTrainConfig(training=training, deepspeed=DeepSpeedConfig(stage, case.accumulation))


def model_of(name: str) -> nn.Module:
    """Return a case's model, of which one weight does not decay: so optimizers have two groups."""
    model = make_model(name, **CASES[name].options)
    largest = max(zoo.prunable(model).items(), key=lambda each: each[1].numel())[0]
    exempt = set(getattr(model, "no_weight_decay", set)())
    model.no_weight_decay = lambda: exempt | {largest}
    return model


def first_batches(source: DataSource) -> list[tuple[Tensor, Tensor]]:
    return list(islice(batches(source), STEPS))


class Run:
    """One training on this rank."""

    def __init__(
        self, ranks: Ranks, name: str, config: SparseTrainConfig, folder: Path | None = None
    ) -> None:
        case, source = CASES[name], sets.load(SMALL_DIGITS)
        self.model = model_of(name)
        compact(self.model, prune(self.model, source, "erk", case.sparsity))
        self.stepper = deepspeed.DeepSpeedStepper(self.model, config, STEPS, ranks, folder)
        self.stepper.model.train()
        half = BATCH // ranks.world_size
        mine = slice(ranks.rank * half, (ranks.rank + 1) * half)
        self.data = [(images[mine], labels[mine]) for images, labels in first_batches(source)]

    def steps(self, first: int, last: int) -> list[float]:
        return [float(self.stepper.step(*each)) for each in self.data[first:last]]

    def masks(self) -> dict[str, Tensor]:
        return {name: weight.mask() for name, weight in compact_weights(self.model)}

    def kept(self) -> dict[str, list[Tensor]]:
        """Return the compact weights' values and their moments, whole."""
        found: dict[str, list[Tensor]] = {}
        for name, each in self.stepper.topology.weights.items():

            def keep(tensor: Tensor, name: str = name) -> Tensor:
                found.setdefault(name, []).append(tensor.clone())
                return tensor

            self.stepper.kept.change(each.parameter, keep)
        return found


def trained(ranks: Ranks, name: str, stage: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Return this rank's losses, the masks after every update, and what is kept in the end."""
    run = Run(ranks, name, settings(name, stage, **changes))
    assert isinstance(run.stepper.kept, KeptSharded) is (stage == 3)
    losses, masks = [], []
    for first in range(0, STEPS, EVERY):
        losses += run.steps(first, min(first + EVERY, STEPS))
        masks.append(run.masks())
    found = {"losses": losses, "masks": masks[:UPDATES], "kept": run.kept()}
    run.stepper.close()
    return found


def resumed(ranks: Ranks, name: str, stage: int, folder: Path, stop: int) -> list[float]:
    """Save after step `stop`, go on from there with a new engine; return the losses after it."""
    config = settings(name, stage)
    first = Run(ranks, name, config, folder)
    first.steps(0, stop)
    first.stepper.save(folder, History())
    first.stepper.close()
    again = Run(ranks, name, config, folder)
    assert again.stepper.load(folder) is not None
    found = again.steps(stop, STEPS)
    again.stepper.close()
    return found
