"""Iterative rewind pruning: train, score, prune, rewind, level by level.

Paper: J. Frankle & M. Carbin, The Lottery Ticket Hypothesis (ICLR 2019), arXiv 1803.03635.
Level i trains the subnetwork of mask i from the initial state; its trained weights are ranked by
the label criterion, and the highest of those that are left make mask i + 1. Everything is
rewound: weights, biases, norms, buffers, the order of batches and the RNG. A level's file holds
the next mask, so a run that was killed goes on with the first level that has no file.

Late rewinding (J. Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis,
ICML 2020, arXiv 1912.05671): with `rewind_steps` k, levels from 1 on start from the state that
level 0 had after k steps, and go on with step k + 1; the optimizer starts anew.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autosparse import criteria
from autosparse.core.config import plain, run_id
from autosparse.core.errors import UsageError, unknown
from autosparse.core.files import (
    check_file,
    check_folder,
    place,
    read_card,
    read_json,
    read_tensors,
    remove_tree,
    set_aside,
    write_json,
    write_tensors,
)
from autosparse.core.locks import CLAIM, Claim, claimed
from autosparse.core.versions import library_versions
from autosparse.corpus import store
from autosparse.criteria.prune import check_model
from autosparse.data import identity, sets
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
from autosparse.training.steppers import Epoch, PlainStepper, check_plain
from autosparse.training.steppers import check as check_training
from autosparse.training.topology.moving import STATIC

LABELS = ("magnitude", "snip", "lamp")
SCHEDULES = ("exponential", "linear")
MAX_LEVELS = 255
ROUNDS = 4
"""In which a level of `live` removes weights: what has lost its paths in one goes in the next."""
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


def check(config: IRPConfig) -> None:
    """Raise UsageError for settings that cannot be."""
    check_training(config.training)
    if config.training.topology != STATIC:
        raise UsageError(
            f"training.topology {config.training.topology} moves the masks that a level of IRP is "
            "to have; leave it out"
        )
    if config.label not in LABELS:
        raise unknown("label criterion", config.label, LABELS)
    if config.schedule not in SCHEDULES:
        raise unknown("schedule", config.schedule, SCHEDULES)
    if config.scope not in masks.SCOPES:
        raise unknown("scope", config.scope, masks.SCOPES)
    if not 0 < config.final_density < 1:
        raise UsageError(f"final_density must be above 0 and below 1, got {config.final_density}")
    if not 1 <= config.levels <= MAX_LEVELS:
        raise UsageError(f"levels must be 1 to {MAX_LEVELS}, got {config.levels}")
    if config.rewind_steps < 0:
        raise UsageError(f"rewind_steps must be at least 0, got {config.rewind_steps}")
    if config.steps_per_level is not None and config.steps_per_level < 1:
        raise UsageError(f"steps_per_level must be at least 1, got {config.steps_per_level}")


def check_whole(config: IRPConfig) -> None:
    """Raise UsageError for all that the settings alone show to be wrong, before work begins."""
    check(config)
    check_plain(config.training)
    zoo.choose_device(config.device)
    check_model(config.model, config.data)
    check_folder(config.out)
    if config.ticket is not None:
        check_file(config.ticket)


def run_folder(config: IRPConfig) -> Path:
    """Return the folder of the run, below `config.out`."""
    return place(config.out) / run_id(config)


def level_file(folder: Path, level: int) -> Path:
    """Return the file of a finished level, which is there until the run is finished."""
    return folder / "levels" / f"{level:02d}" / "level.safetensors"


def run_irp(
    config: IRPConfig,
    on_epoch: OnEpoch | None = None,
    on_level: OnLevel | None = None,
    *,
    wait: bool = False,
    way: str | None = None,
) -> Path:
    """Do one IRP run, or what is left of it; return its folder.

    On a GPU all levels share one network with dense weights under masks (see masked_stepper.py),
    elsewhere each has compact weights of its own; that makes no difference but rounding. The
    card records which it was, and the device.

    Args:
        config: what to run; `config.out` is the corpus folder (or URL).
        on_epoch: called with (level, Epoch) after every epoch.
        on_level: called with the level's entry of the card, also for levels found on disk.
        wait: if another process is at this run, wait for it to finish or to die; otherwise that
            is a UsageError.
        way: `masked` or `compact`, if it is not to be as the device has it.
    """
    check(config)
    folder = run_folder(config)
    if store.is_finished(folder):
        check_found(folder, sets.if_there(config.data))
        tidy(folder)
        return folder
    identity.tell_of_former(lambda: run_folder(config), store.FINISHED)
    run, card, dense = _prepared(config, folder, on_epoch, way)
    with claimed(folder, wait=wait, finished=lambda: store.is_finished(folder)) as claim:
        if claim is None or store.is_finished(folder):
            return folder
        _begin(folder, card)
        card["levels"], survival = _all_levels(run, dense.masks, on_level, claim)
        claim.check()
        weights = {name: run.initial.get_parameter(name).detach() for name in dense.masks}
        found = store.IRPRun(weights, survival, dense.rest, card, run.rewound())
        store.write_run(folder, found, store_initial=config.store_initial)
        remove_tree(folder / "levels")
    return folder


def check_found(folder: Path, there: DataSource | None) -> None:
    """Raise UsageError if a finished run is of other data of the same name than are there now."""
    if there is not None:
        recorded = read_card(folder / store.RUN).get("data_fingerprint")
        sets.check_found(recorded, there, folder)


def tidy(folder: Path) -> None:
    """Remove what a kill between a run's commit marker and its end has left behind."""
    with suppress(OSError):  # A corpus that may only be read stays as it is.
        if (folder / "levels").exists():
            remove_tree(folder / "levels")
        (folder / CLAIM).unlink(missing_ok=True)


def _prepared(
    config: IRPConfig, folder: Path, on_epoch: OnEpoch | None, way: str | None
) -> tuple[_Run, dict[str, Any], Ticket]:
    """Return the run, its card, and the dense ticket; nothing is written yet."""
    device = zoo.choose_device(config.device)
    source = sets.load(config.data).to(device)
    initial = zoo.create_for(source, config.model, config.seed)
    names = list(zoo.prunable(initial, config.model.exclude))
    dense = Ticket.from_model(initial, {n: _ones_like(initial, n) for n in names}, {})
    per_epoch = steps_per_epoch(source.train, config.training)
    steps = config.steps_per_level or per_epoch * config.training.epochs
    if config.rewind_steps >= steps:
        raise UsageError(f"rewind_steps {config.rewind_steps}: a level has {steps} steps only")
    card = _card(config, initial, source, dense)
    card["batches"]["steps_per_epoch"] = per_epoch
    way = way or way_on(device, config.training)
    return _Run(config, initial, source, folder, steps, on_epoch, way), card, dense


def way_on(device: torch.device, config: TrainingConfig) -> str:
    """Return how levels are trained on a device: `masked` on a GPU, if that comes to the same."""
    return MASKED if device.type == "cuda" and can_train(config) else COMPACT


def _ones_like(model: nn.Module, name: str) -> Tensor:
    return torch.ones_like(model.get_parameter(name), dtype=torch.bool)


def _card(config: IRPConfig, initial: nn.Module, source: DataSource, start: Ticket) -> dict:
    return {
        "run_id": run_id(config),
        "config": {**plain(config), "out": "", "device": ""},
        "model": initial.autosparse_recipe,
        "data_fingerprint": source.fingerprint,
        "normalisation": source.normalisation(),
        "initial_hash": start.content_hash,
        "prunable": list(start.masks),
        "prunable_weights": start.kept,
        "gradients": {"samples_per_class": config.samples_per_class, "seed": config.seed},
        "batches": {
            "seed": config.seed,
            "order": "epoch e of every level: torch.randperm by seed * 1000003 + e",
            "replay": "irp.replay gives the weights after any steps of any level again",
        },
        "versions": library_versions(),
    }


def _begin(folder: Path, card: dict[str, Any]) -> None:
    """Write the card of a new run, or make sure that the folder holds the same run's levels."""
    path = folder / "card.json"
    if not path.exists():
        write_json(path, card)
        return
    try:
        before = read_json(path)
        _ = before["initial_hash"], before["data_fingerprint"]
    except (UsageError, KeyError, TypeError) as error:
        problem = error if isinstance(error, UsageError) else UsageError(f"{path} is damaged")
        raise set_aside(path, "write it anew", problem) from None
    for key, what in (("initial_hash", "initial weights"), ("data_fingerprint", "data")):
        if before[key] != card[key]:
            raise UsageError(
                f"{folder} was begun with other {what} (another version of a library, or other "
                "files); remove the folder to start the run anew"
            )


@dataclass(frozen=True)
class _Run:
    """What all levels have in common."""

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
        """Return what trains all levels where weights are masked."""
        training = self.training()
        return MaskedStepper(
            copy.deepcopy(self.initial).to(zoo.choose_device(self.config.device)),
            training,
            steps_per_epoch(self.source.train, training),
            list(zoo.prunable(self.initial, self.config.model.exclude)),
        )

    def stepper(self, level: int, current: dict[str, Tensor]) -> PlainStepper:
        """Return what trains a level, at its start."""
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
        found = _under(REWIND, tensors)
        if entry.get("rewound", _digest(found)) != _digest(found):
            problem = UsageError(f"{self.path(0)} is damaged (its state is not what was written)")
            raise set_aside(self.path(0), "do that level again", problem)
        return found

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


def _all_levels(
    run: _Run, dense: dict[str, Tensor], on_level: OnLevel | None, claim: Claim
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


def _do_level(run: _Run, level: int, current: dict[str, Tensor], following: int | None) -> None:
    """Train one level from the state it starts in and write its file: the next masks, if any."""
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
    kept = {name: int(mask.count_nonzero()) for name, mask in best.items()}
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
        found = {name: masks.unpack(packed[name], mask.shape) for name, mask in current.items()}
        if fingerprint is not None and masks.fingerprint(found) != fingerprint:
            raise UsageError(f"{path} is damaged (its masks are not what was written)")
    except (UsageError, KeyError, TypeError, ValueError, RuntimeError) as error:
        problem = error if isinstance(error, UsageError) else UsageError(f"{path} is damaged")
        raise set_aside(path, "do that level again", problem) from None
    return found, entry


def replay(run: store.IRPRun, level: int, steps: int, source: DataSource) -> dict[str, Tensor]:
    """Return the dense state dict after `steps` steps of a level, made again: zero where pruned.

    Args:
        run: a finished run.
        level: 0 (dense) to N.
        steps: how many of the level's steps to make, at least 1.
        source: the data that the run was made on.

    Bit for bit what the run had, on the same hardware, versions and number of threads. Raises
    UsageError if the data are others, or the level has not so many steps.
    """
    if source.fingerprint != run.card["data_fingerprint"]:
        raise UsageError(f"run {run.card['run_id']} was made on other data")
    config = run.card["config"]
    training = TrainingConfig(**config["training"])
    if config.get("steps_per_level") is not None:
        training = replace(training, schedule="none")
    first = config.get("rewind_steps", 0) if level else 0
    dense = zoo.from_recipe(run.card["model"])
    ticket = run.ticket(level) if level else _dense_ticket(run)
    most = run.card["levels"][level].get("image_passes", 0) // training.batch_size
    if most and not 1 <= steps <= most:
        raise UsageError(f"level {level} has steps 1 to {most}, not {steps}")
    per_epoch = steps_per_epoch(source.train, training)
    masked = run.card["levels"][level].get("way") == MASKED
    if masked:
        stepper = MaskedStepper(dense, training, per_epoch, list(ticket.masks)).begin(ticket)
    else:
        stepper = PlainStepper(compact(dense, ticket), training, per_epoch)
    with seeded(config["seed"]):
        fit(stepper, source, training, seed=config["seed"], span=Span(first, first + steps))
    return (dense if masked else densify(dense)).state_dict()


def _dense_ticket(run: store.IRPRun) -> Ticket:
    """Return level 0: all weights, at init (also where later levels rewind to step k)."""
    values = {name: tensor.flatten() for name, tensor in run.initial.items()}
    return Ticket(run.masks(0), values, run.rest, run.ticket(0).card)
