"""One level after another: train the subnetwork, rank its weights, write the next masks.

A level's file holds the masks of the next level, so a run that was killed goes on with the first
level that has no file.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autosparse import criteria
from autosparse.core.errors import UsageError
from autosparse.core.files import read_tensors, set_aside, write_tensors
from autosparse.core.locks import Claim
from autosparse.corpus import store
from autosparse.data.sets import DataSource
from autosparse.irp.config import IRPConfig
from autosparse.models import zoo
from autosparse.models.zoo import device_name, device_of
from autosparse.sparsity import masks, reach
from autosparse.sparsity.compact import densify
from autosparse.sparsity.counts import keep_density
from autosparse.sparsity.ticket import Ticket, compact
from autosparse.training.config import TrainingConfig
from autosparse.training.loop import Span, fit, seeded, steps_per_epoch
from autosparse.training.masked_stepper import MaskedStepper, can_train
from autosparse.training.steppers import Epoch, PlainStepper

ROUNDS = 4
"""`live` removes weights in this many rounds; a weight that lost its last path in one round is
removed first in the next. As in criteria/autos_irp.py."""
REWIND, MASK = "rewind/", "mask/"
MASKED, COMPACT = "masked", "compact"
"""The two ways to train a level: dense weights under masks, or compact weights."""

OnEpoch = Callable[[int, Epoch], None]
OnLevel = Callable[[dict[str, Any]], None]


def densities(levels: int, final_density: float, schedule: str) -> list[float]:
    """Return the density of levels 0 (dense, 1.0) to `levels` (final_density)."""
    if schedule == "exponential":
        falling = [final_density ** (level / levels) for level in range(levels)]
    else:
        falling = [1 - (1 - final_density) * level / levels for level in range(levels)]
    return [*falling, final_density]


def level_file(folder: Path, level: int) -> Path:
    """Return the file of a finished level, which is there until the run is finished."""
    return folder / "levels" / f"{level:02d}" / "level.safetensors"


def way_for(device: torch.device, config: TrainingConfig) -> str:
    """Return how levels are trained on a device: MASKED on a GPU, if the settings allow it."""
    return MASKED if device.type == "cuda" and can_train(config) else COMPACT


@dataclass(frozen=True)
class LevelRun:
    """One run: what all of its levels share."""

    config: IRPConfig
    initial: nn.Module
    source: DataSource
    folder: Path
    steps: int
    """Of one training."""
    on_epoch: OnEpoch | None
    way: str
    """MASKED or COMPACT."""

    @cached_property
    def masked(self) -> MaskedStepper:
        """Return the one stepper that trains all levels under masks."""
        training = self.training()
        return MaskedStepper(
            copy.deepcopy(self.initial).to(zoo.choose_device(self.config.device)),
            training,
            steps_per_epoch(self.source.train, training),
            list(zoo.prunable(self.initial, self.config.model.exclude)),
        )

    def stepper(self, level: int, current: dict[str, Tensor]) -> PlainStepper:
        """Return the stepper of a level, before its first step."""
        dense = self.start(level)
        ticket = Ticket.from_model(dense, current, {})
        if self.way == MASKED:
            return self.masked.begin(ticket)
        model = compact(dense, ticket).to(zoo.choose_device(self.config.device))
        training = self.training()
        return PlainStepper(model, training, steps_per_epoch(self.source.train, training))

    def path(self, level: int) -> Path:
        """Return the file of a finished level."""
        return level_file(self.folder, level)

    def rewound(self) -> dict[str, Tensor]:
        """Return the state dict after step k of level 0, which must be finished; {} for k = 0."""
        if not self.config.rewind_steps:
            return {}
        tensors, entry = read_tensors(self.path(0))
        state = _under(REWIND, tensors)
        if entry.get("rewound", _digest(state)) != _digest(state):
            problem = UsageError(f"{self.path(0)} is damaged (its state is not what was written)")
            raise set_aside(self.path(0), "do that level again", problem)
        return state

    def start(self, level: int) -> nn.Module:
        """Return a copy of the dense model that a level starts from."""
        model = copy.deepcopy(self.initial)
        if level and self.config.rewind_steps:
            model.load_state_dict(self.rewound())
        return model

    def training(self) -> TrainingConfig:
        """Return how a level is trained."""
        if self.config.steps_per_level is None:
            return self.config.training
        return replace(self.config.training, schedule="none")


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def all_levels(
    run: LevelRun, dense: dict[str, Tensor], on_level: OnLevel | None, claim: Claim
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Do levels 0 to N; return their card entries and the survival of every weight."""
    config = run.config
    total = masks.kept(dense)
    counts = [
        keep_density(total, density)
        for density in densities(config.levels, config.final_density, config.schedule)
    ]
    current, entries = dense, []
    survival = {name: torch.zeros_like(mask, dtype=torch.uint8) for name, mask in dense.items()}
    for level in range(config.levels + 1):
        claim.check()
        if not run.path(level).exists():
            following = counts[level + 1] if level < config.levels else None
            _do_level(run, level, current, following)
        following_masks, entry = _read_level(run.path(level), current)
        if entries and entry.get("device", "cpu") != entries[-1].get("device", "cpu"):
            warnings.warn(
                f"level {level} of {run.folder} was trained on {entry.get('device', 'cpu')}, the "
                f"level before on {entries[-1].get('device', 'cpu')}; they differ by rounding",
                stacklevel=2,
            )
        entries.append(entry)
        if on_level:
            on_level(entry)
        if following_masks is not None:
            current = following_masks
            for name, mask in current.items():
                survival[name] += mask
    return entries, survival


def _do_level(run: LevelRun, level: int, current: dict[str, Tensor], following: int | None) -> None:
    """Train one level from its starting state and write its file, with the next masks, if any."""
    config, on_epoch, training = run.config, run.on_epoch, run.training()
    started = time.perf_counter()
    stepper = run.stepper(level, current)
    model = stepper.model
    tensors: dict[str, Tensor] = {}

    def on_step(number: int) -> None:
        if level == 0 and number == config.rewind_steps:
            state = (densify(copy.deepcopy(model)) if run.way == COMPACT else model).state_dict()
            tensors.update({REWIND + name: tensor.cpu().clone() for name, tensor in state.items()})

    with seeded(config.seed):
        history = fit(
            stepper,
            run.source,
            training,
            seed=config.seed,
            on_epoch=(lambda epoch: on_epoch(level, epoch)) if on_epoch else None,
            span=Span(config.rewind_steps if level else 0, config.steps_per_level),
            on_step=on_step,
        )
    following_fingerprint = None
    if following is not None:
        dense = densify(model) if run.way == COMPACT else model
        chosen = _next_masks(config, dense, run.source, current, following)
        tensors |= {MASK + name: masks.pack(mask) for name, mask in chosen.items()}
        following_fingerprint = masks.fingerprint(chosen)
    kept = masks.kept(current)
    steps = run.steps - (config.rewind_steps if level else 0)
    entry = {
        "level": level,
        "kept": kept,
        "density": kept / masks.total(current),
        "validation_accuracy": history.epochs[-1].validation_accuracy,
        "train_loss": history.epochs[-1].train_loss,
        "image_passes": steps * config.training.batch_size,
        "seconds": round(time.perf_counter() - started, 3),
        "images_per_second": round(history.epochs[-1].images_per_second, 1),
        "device": device_name(device_of(model)),
        "way": run.way,
    }
    rewound = _under(REWIND, tensors)
    checks = {"next": following_fingerprint, "rewound": _digest(rewound) if rewound else None}
    write_tensors(run.path(level), tensors, entry | {k: v for k, v in checks.items() if v})


def _digest(tensors: dict[str, Tensor]) -> str:
    """Return a SHA-256 of named tensors."""
    entries = [[name, store.sha256_of_tensor(tensors[name])] for name in sorted(tensors)]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _next_masks(
    config: IRPConfig,
    trained: nn.Module,
    source: DataSource,
    current: dict[str, Tensor],
    count: int,
) -> dict[str, Tensor]:
    batches = source.score_batches(config.samples_per_class, seed=config.seed)
    scores = criteria.get(config.label)(
        trained, batches, nn.functional.cross_entropy, exclude=config.model.exclude
    )
    best = masks.keep(scores, count, scope=config.scope, within=current)
    if not config.live:
        return best
    kept = masks.counts(best)
    shape = (source.in_chans, source.image_size, source.image_size)
    return reach.best_on_paths(trained, scores, kept, shape, within=current, rounds=ROUNDS)


def _read_level(
    path: Path, current: dict[str, Tensor]
) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
    try:
        tensors, entry = read_tensors(path)
        fingerprint, _ = entry.pop("next", None), entry.pop("rewound", None)
        packed = _under(MASK, tensors)
        if not packed and fingerprint is None:
            return None, entry
        following = {name: masks.unpack(packed[name], mask.shape) for name, mask in current.items()}
        if fingerprint is not None and masks.fingerprint(following) != fingerprint:
            raise UsageError(f"{path} is damaged (its masks are not what was written)")
    except (UsageError, KeyError, TypeError, ValueError, RuntimeError) as error:
        problem = error if isinstance(error, UsageError) else UsageError(f"{path} is damaged")
        raise set_aside(path, "do that level again", problem) from None
    return following, entry
