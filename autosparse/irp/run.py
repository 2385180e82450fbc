"""Iterative rewind pruning: train, score, prune, rewind, level by level.

Paper: J. Frankle & M. Carbin, The Lottery Ticket Hypothesis (ICLR 2019), arXiv 1803.03635.
Level i trains the subnetwork of mask i from the initial state; its trained weights are ranked by
the label criterion, and the highest of those that are left make mask i + 1. Everything is
rewound: weights, biases, norms, buffers, the order of batches and the RNG (see levels.py).

Late rewinding (J. Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis,
ICML 2020, arXiv 1912.05671): with `rewind_steps` k, levels from 1 on start from the state that
level 0 had after k steps, and go on with step k + 1; the optimizer starts anew.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from autosparse.core.config import plain, run_id
from autosparse.core.errors import UsageError, unknown
from autosparse.core.files import (
    check_file,
    check_folder,
    place,
    read_card,
    read_json,
    remove_tree,
    set_aside,
    write_json,
)
from autosparse.core.locks import CLAIM, claimed
from autosparse.core.ranges import check_ranges
from autosparse.core.versions import library_versions
from autosparse.corpus import store
from autosparse.criteria.pruning import check_model
from autosparse.data import identity, sets
from autosparse.data.sets import DataSource
from autosparse.irp.config import IRPConfig
from autosparse.irp.levels import LevelRun, OnEpoch, OnLevel, all_levels, way_for
from autosparse.models import zoo
from autosparse.sparsity import masks
from autosparse.sparsity.ticket import Ticket
from autosparse.training.checks import check as check_training
from autosparse.training.checks import check_plain
from autosparse.training.loop import steps_per_epoch
from autosparse.training.topology.base import STATIC

LABELS = ("magnitude", "snip", "lamp")
SCHEDULES = ("exponential", "linear")
RANGES = {
    "final_density": "above 0 and below 1",
    "levels": "whole and at least 1 and at most 255",  # Survival is stored as a byte.
    "samples_per_class": "whole and at least 1",
    "rewind_steps": "whole and at least 0",
    "steps_per_level": "whole and at least 1",
}


def check(config: IRPConfig) -> None:
    """Raise UsageError for settings that cannot be."""
    check_training(config.training)
    if config.training.topology != STATIC:
        raise UsageError(
            f"training.topology {config.training.topology} moves the masks that a level of IRP is "
            "to have; leave it out"
        )
    if config.training.slim:
        raise UsageError("training.slim is for trainings of a ticket, not for IRP; leave it out")
    if config.label not in LABELS:
        raise unknown("label criterion", config.label, LABELS)
    for name, known in {"schedule": SCHEDULES, "scope": masks.SCOPES}.items():
        if getattr(config, name) not in known:
            raise unknown(name, getattr(config, name), known)
    check_ranges(config, RANGES)


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


def run_irp(
    config: IRPConfig,
    on_epoch: OnEpoch | None = None,
    on_level: OnLevel | None = None,
    *,
    wait: bool = False,
    way: str | None = None,
) -> Path:
    """Do one IRP run, or the rest of one that was interrupted; return its folder.

    On a GPU all levels share one network with dense weights under masks (see masked_stepper.py);
    elsewhere each level has compact weights of its own. The two differ by rounding only. The card
    records which it was, and the device.

    Args:
        config: what to run; `config.out` is the corpus folder (or URL).
        on_epoch: called with (level, Epoch) after every epoch.
        on_level: called with the level's entry of the card, also for levels found on disk.
        wait: if another process is at this run, wait for it to finish or to die; otherwise that
            is a UsageError.
        way: `masked` or `compact`; by default the one that suits the device.
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
        card["levels"], survival = all_levels(run, dense.masks, on_level, claim)
        claim.check()
        weights = {name: run.initial.get_parameter(name).detach() for name in dense.masks}
        finished = store.IRPRun(weights, survival, dense.rest, card, run.rewound())
        store.write_run(folder, finished, store_initial=config.store_initial)
        remove_tree(folder / "levels")
    return folder


def check_found(folder: Path, there: DataSource | None) -> None:
    """Raise UsageError if a finished run is of other data of the same name than are there now."""
    if there is not None:
        recorded = read_card(folder / store.RUN).get("data_fingerprint")
        sets.check_found(recorded, there, folder)


def tidy(folder: Path) -> None:
    """Remove what a run left behind that was killed after it wrote its commit marker."""
    with suppress(OSError):  # A corpus that may only be read stays as it is.
        if (folder / "levels").exists():
            remove_tree(folder / "levels")
        (folder / CLAIM).unlink(missing_ok=True)


def _prepared(
    config: IRPConfig, folder: Path, on_epoch: OnEpoch | None, way: str | None
) -> tuple[LevelRun, dict[str, Any], Ticket]:
    """Return the run, its card, and the dense ticket; nothing is written yet."""
    device = zoo.choose_device(config.device)
    source = sets.load(config.data).to(device)
    initial = zoo.create_for(source, config.model, config.seed)
    weights = zoo.prunable(initial, config.model.exclude)
    dense = Ticket.from_model(initial, masks.dense(weights), {})
    per_epoch = steps_per_epoch(source.train, config.training)
    steps = config.steps_per_level or per_epoch * config.training.epochs
    if config.rewind_steps >= steps:
        raise UsageError(f"rewind_steps {config.rewind_steps}: a level has {steps} steps only")
    card = _card(config, initial, source, dense)
    card["batches"]["steps_per_epoch"] = per_epoch
    way = way or way_for(device, config.training)
    return LevelRun(config, initial, source, folder, steps, on_epoch, way), card, dense


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
    """Write the card of a new run, or check that a run begun before is the same one."""
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
    compared = {"initial_hash": "initial weights", "data_fingerprint": "data"}
    if card["config"]["data"]["name"] in identity.OWN:  # Known by content: the id holds it.
        del compared["data_fingerprint"]
    for key, what in compared.items():
        if before[key] != card[key]:
            raise UsageError(
                f"{folder} was begun with other {what} (another version of a library, or other "
                "files); remove the folder to start the run anew"
            )
