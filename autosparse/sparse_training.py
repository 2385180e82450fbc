"""Train tickets: each into a folder of its own, finished ones found and not trained again.

A cell is one ticket (or the dense model) with one training config. Its folder is named by the
ticket's file and a hash of all that made it; `result.json` is written last.
"""

from __future__ import annotations

import glob
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from autosparse import data as data_module
from autosparse import masks, models
from autosparse.compaction import compact
from autosparse.config import (
    DataConfig,
    PruneConfig,
    SparseTrainConfig,
    from_plain,
    plain,
    run_id,
)
from autosparse.data import DataSource
from autosparse.errors import Stopped, UsageError, unknown
from autosparse.files import read_json, write_json
from autosparse.pruning import DEAD, DENSE, dead_line, prune, prune_as, refuse_dead
from autosparse.steppers import Epoch, Ranks, Stepper
from autosparse.ticket import Ticket
from autosparse.training import Span, Watch, evaluate, fit, seeded, steps_per_epoch
from autosparse.versions import environment

RESULT, TRAINED = "result.json", "trained.safetensors"
CHECKPOINTS, UNSENT = "deepspeed", "mlflow_unsent.json"
SETTINGS = "settings.json"
"""What a training was told, and where it ran, at its last start."""
MakeStepper = Callable[[nn.Module, int], Stepper]
"""(compact model on its device, steps per epoch) -> Stepper."""
ONE_PROCESS = Ranks()


@dataclass(frozen=True)
class Cell:
    """One training to be done."""

    name: str
    ticket: Ticket
    data: DataConfig
    seed: int
    folder: Path

    @property
    def done(self) -> bool:
        """Whether its result is there."""
        return (self.folder / RESULT).is_file()

    def result(self) -> dict[str, Any]:
        """Return the result of a finished cell."""
        return read_json(self.folder / RESULT)


def unsent(cell: Cell) -> bool:
    """Whether some of what an Observer was told has not been sent yet."""
    return (cell.folder / UNSENT).is_file()


class Observer(Protocol):
    """What watches cells being trained; see integrations/mlflow.py."""

    def found(self, cell: Cell, config: SparseTrainConfig) -> None: ...

    def begin(self, cell: Cell, config: SparseTrainConfig, settings: dict[str, Any]) -> None: ...

    def epoch(self, cell: Cell, epoch: Epoch) -> None: ...

    def stopped(self, cell: Cell) -> None: ...

    def failed(self, cell: Cell, reason: str) -> None: ...

    def end(self, cell: Cell, result: dict[str, Any]) -> None: ...


def cells(
    config: SparseTrainConfig, *, ranks: Ranks = ONE_PROCESS, device: str = "cpu"
) -> Iterator[Cell]:
    """Yield the cells of a config: one per ticket file, or what is pruned now, or the dense model.

    Where there are several ranks, all of them call this, and prune together.
    """
    if not config.tickets:
        yield _pruned_cell(config, ranks, device) if config.prune else _dense_cell(config)
        return
    patterns = [config.tickets] if isinstance(config.tickets, str) else config.tickets
    for path in _expand(patterns):
        yield _ticket_cell(config, path)


def _ticket_cell(config: SparseTrainConfig, path: Path) -> Cell:
    ticket = Ticket.load(path)
    empty = masks.first_empty(ticket.masks)
    allowed = ticket.card.get("selection", {}).get("guard") == "none"
    if empty is not None and not allowed:
        raise UsageError(f"{path} empties a layer: {empty} keeps no weight; prune it again")
    seed = config.seed if config.seed is not None else int(ticket.card.get("seed", 0))
    return _cell(config, path.stem, ticket, _data(config, ticket, path), seed)


def _pruned_cell(config: SparseTrainConfig, ranks: Ranks, device: str) -> Cell:
    """Prune as `config.prune` says, once; the ticket's file is found the next time."""
    asked = config.prune or PruneConfig()
    name = f"{asked.model.name}-{asked.criterion}-{asked.sparsity:g}-{run_id(asked)}"
    path = Path(config.out) / "tickets" / f"{name}.safetensors"
    if path.is_file():
        return _ticket_cell(config, path)
    ticket = prune_as(replace(asked, device=device), ranks=ranks)
    if ranks.rank == 0:
        ticket.save(path)
    seed = config.seed if config.seed is not None else asked.seed
    return _cell(config, name, ticket, config.data or asked.data, seed)


def _dense_cell(config: SparseTrainConfig) -> Cell:
    if config.model is None:
        raise UsageError(
            "give tickets, or what to prune (--prune.criterion …), or a model to train dense "
            "(--model.name …)"
        )
    data, seed = config.data or DataConfig(), config.seed or 0
    source = data_module.load(data)
    model = models.create_for(source, config.model, seed)
    return _cell(config, DENSE, prune(model, data, DENSE, seed=seed), data, seed)


def _cell(
    config: SparseTrainConfig, name: str, ticket: Ticket, data: DataConfig, seed: int
) -> Cell:
    key = run_id(config, ticket.content_hash, run_id(data), str(seed))
    return Cell(name, ticket, data, seed, Path(config.out) / f"{name}-{key}")


def _expand(patterns: list[str]) -> list[Path]:
    paths = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]  # noqa: PTH207
        if not found:
            raise UsageError(f"no ticket matches {pattern}")
        paths += [Path(each) for each in found]
    return paths


def _data(config: SparseTrainConfig, ticket: Ticket, path: Path) -> DataConfig:
    if config.data is not None:
        return config.data
    described = ticket.card.get("data", {})
    if "image_size" not in described:
        raise UsageError(f"{path} does not say which data it was made on; set data.name")
    return from_plain(DataConfig, described)


def train_cell(
    cell: Cell,
    config: SparseTrainConfig,
    source: DataSource,
    make_stepper: MakeStepper,
    *,
    device: str,
    ranks: Ranks = ONE_PROCESS,
    observer: Observer | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    watch: Watch | None = None,
    stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Train one cell on this rank, write its trained ticket and result, and return the result.

    `observer` is given on rank 0 only. The test split is looked at once, at the end. `watch` and
    `stop` are those of `training.fit`.
    """
    if cell.done:
        if observer:
            observer.found(cell, config)
        return cell.result()
    _tell_dead(cell, config.dead, ranks)
    model = build(cell.ticket, source).to(models.choose_device(device))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    stepper = make_stepper(model, steps_per_epoch(source.train, config.training, ranks.world_size))
    settings = _settings(cell, config, stepper)
    if observer:
        observer.begin(cell, config, settings)

    def note(epoch: Epoch) -> None:
        if observer:
            observer.epoch(cell, epoch)
        if on_epoch:
            on_epoch(epoch)

    with seeded(cell.seed * 131 + ranks.rank), _told(observer, cell):
        history = fit(
            stepper,
            source,
            config.training,
            seed=cell.seed,
            folder=cell.folder,
            on_epoch=note,
            span=Span(cell.ticket.card.get("rewind_steps", 0)),
            watch=watch,
            stop=stop,
        )
    test = evaluate(stepper.evaluated(), source, source.test, ranks)
    state = stepper.state_dict()
    result = _result(cell, parameters, history.plain(), test.accuracy, test.loss)
    steps = steps_per_epoch(source.train, config.training, ranks.world_size)
    result["training_passes"] = steps * config.training.epochs * config.training.batch_size
    if ranks.rank == 0:
        write_json(cell.folder / SETTINGS, settings)
        _finish(cell, config, model, state, result)
        if observer:
            observer.end(cell, result)
    return result


def _tell_dead(cell: Cell, dead: str, ranks: Ranks) -> None:
    """Warn of a ticket that is known to be dead, or refuse it, before it is trained."""
    if dead not in DEAD:
        raise unknown("value of dead", dead, DEAD)
    if dead == "error":
        refuse_dead(cell.ticket.card)
    elif "dead" in cell.ticket.card and ranks.rank == 0:
        warnings.warn(f"{cell.name}: {dead_line(cell.ticket.card)}", stacklevel=3)


@contextmanager
def _told(observer: Observer | None, cell: Cell) -> Iterator[None]:
    """Tell the observer of a training that was told to stop, or that fails."""
    try:
        yield
    except (Stopped, KeyboardInterrupt):
        if observer:
            observer.stopped(cell)
        raise
    except Exception as error:
        if observer:
            observer.failed(cell, str(error))
        raise


def _settings(cell: Cell, config: SparseTrainConfig, stepper: Stepper) -> dict[str, Any]:
    return {
        "config": {**plain(config), "data": plain(cell.data), "seed": cell.seed},
        "deepspeed": stepper.settings,
        "ranks": stepper.ranks.world_size,
        "environment": environment(),
    }


def build(ticket: Ticket, source: DataSource) -> nn.Module:
    """Build the ticket's model, compact, on the CPU; raise UsageError if the data do not fit it."""
    recipe = ticket.card.get("model", {})
    for key in ("num_classes", "in_chans", "image_size"):
        if recipe.get(key) != getattr(source, key):
            raise UsageError(
                f"the ticket's model has {key} {recipe.get(key)}, the data {source.name} "
                f"{getattr(source, key)}"
            )
    return compact(models.from_recipe(recipe), ticket)


def _result(
    cell: Cell, parameters: int, history: list[dict], accuracy: float, loss: float
) -> dict[str, Any]:
    card = cell.ticket.card
    return {
        "name": cell.name,
        "model": card["model"]["name"],
        "criterion": card.get("criterion", "unknown"),
        "sparsity": round(card.get("sparsity", cell.ticket.sparsity), 6),
        "seed": cell.seed,
        "test_accuracy": accuracy,
        "test_loss": loss,
        "validation_accuracy": history[-1]["validation_accuracy"],
        "parameters": parameters,
        "kept": cell.ticket.kept,
        "seconds": round(sum(epoch["seconds"] for epoch in history), 3),
        "prune_seconds": card.get("seconds", 0.0),
        "image_passes": card.get("image_passes", 0.0),
        "effective_density": card.get("effective_density"),
        "fingerprint": cell.ticket.fingerprint,
        "history": history,
    }


def _finish(
    cell: Cell, config: SparseTrainConfig, model: nn.Module, state: dict, result: dict[str, Any]
) -> None:
    path = cell.folder / TRAINED
    trained = {key: value for key, value in result.items() if key != "history"}
    card = {**cell.ticket.card, "trained": trained, "training": plain(config.training)}
    Ticket.from_compact(model, cell.ticket, card, state).save(path)
    result["checkpoint_bytes"] = path.stat().st_size
    write_json(cell.folder / RESULT, result)
    for checkpoint in ("checkpoint.pt", CHECKPOINTS):
        target = cell.folder / checkpoint
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
    for cut in cell.folder.glob(".*.tmp"):  # Of starts that were killed.
        cut.unlink(missing_ok=True)
