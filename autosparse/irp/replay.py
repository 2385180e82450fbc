"""Train a level of a finished run again, to have its weights after any step."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from autosparse.core.config import run_id
from autosparse.core.errors import UsageError
from autosparse.corpus import store
from autosparse.data import identity
from autosparse.data.sets import DataSource
from autosparse.irp.config import IRPConfig
from autosparse.irp.levels import MASKED
from autosparse.models import zoo
from autosparse.models.config import ModelConfig
from autosparse.sparsity.compact import densify
from autosparse.sparsity.ticket import Ticket, compact
from autosparse.training.config import TrainingConfig
from autosparse.training.loop import Span, fit, seeded, steps_per_epoch
from autosparse.training.masked_stepper import MaskedStepper
from autosparse.training.steppers import PlainStepper


def replay(
    run: store.IRPRun, level: int, steps: int, source: DataSource, device: str = "cpu"
) -> dict[str, Tensor]:
    """Train a level of a finished run again; return the dense state dict, zero where pruned.

    Args:
        run: a finished run.
        level: 0 (dense) to N.
        steps: how many of the level's steps to make, at least 1.
        source: the data that the run was made on.
        device: where to train, cpu or cuda; the state dict lies there too.

    It is the run's own state bit for bit on the device that the level's card names, with the same
    hardware, versions and number of threads; on another it differs by rounding.
    Raises UsageError if the data are others, or the level has fewer steps.
    """
    if source.fingerprint != run.card["data_fingerprint"] and not _of_same_content(run, source):
        raise UsageError(f"run {run.card['run_id']} was made on other data")
    config = run.card["config"]
    training = TrainingConfig(**config["training"])
    if config.get("steps_per_level") is not None:
        training = replace(training, schedule="none")
    first = config.get("rewind_steps", 0) if level else 0
    where = zoo.choose_device(device)
    source = source.to(where)
    dense = zoo.from_recipe(run.card["model"]).to(where)
    ticket = run.ticket(level) if level else _dense_ticket(run)
    most = run.card["levels"][level].get("image_passes", 0) // training.batch_size
    if most and not 1 <= steps <= most:
        raise UsageError(f"level {level} has steps 1 to {most}, not {steps}")
    per_epoch = steps_per_epoch(source.train, training)
    masked = run.card["levels"][level].get("way") == MASKED
    if masked:
        stepper = MaskedStepper(dense, training, per_epoch, list(ticket.masks)).begin(ticket)
    else:
        stepper = PlainStepper(compact(dense, ticket).to(where), training, per_epoch)
    with seeded(config["seed"]):
        fit(stepper, source, training, seed=config["seed"], span=Span(first, first + steps))
    return (dense if masked else densify(dense)).state_dict()


def _of_same_content(run: store.IRPRun, source: DataSource) -> bool:
    """Whether own data are the run's, also where one was held in memory and the other streamed."""
    config = run.card["config"]
    if source.config.name not in identity.OWN:
        return False
    parts = {
        "model": ModelConfig(**config["model"]),
        "training": TrainingConfig(**config["training"]),
        "data": source.config,
    }
    return run_id(IRPConfig(**{**config, **parts})) == run.card["run_id"]


def _dense_ticket(run: store.IRPRun) -> Ticket:
    """Return level 0: all weights, at init (also where later levels rewind to step k)."""
    values = {name: tensor.flatten() for name, tensor in run.initial.items()}
    return Ticket(run.masks(0), values, run.rest, run.ticket(0).card)
