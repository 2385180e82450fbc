"""Cells trained one after another in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from autosparse.core.config import run_id
from autosparse.core.errors import Stopped, UserError
from autosparse.core.progress import Progress
from autosparse.data import identity, sets
from autosparse.data.sets import DataSource
from autosparse.models import zoo
from autosparse.study.cells import Cell
from autosparse.study.config import SparseTrainConfig, StudyConfig
from autosparse.study.grid import FAILED, StudyCell
from autosparse.study.tickets import ticket_of
from autosparse.study.trainings import RESULT, train_cell
from autosparse.training.steppers import Epoch, PlainStepper


def in_one_line(error: Exception) -> str:
    """Return what is written down of a cell that failed; a user's mistake explains itself."""
    line = " ".join(str(error).split())
    kind = "" if isinstance(error, UserError) else type(error).__name__
    return ": ".join(part for part in (kind, line) if part)


class Tracker(Protocol):
    """What logs the cells of a study; see integrations/tracking.py."""

    def epochs(self, cell: StudyCell, entries: list[dict[str, Any]]) -> None: ...

    def end(self, cell: StudyCell) -> None: ...


def run(config: StudyConfig, planned: list[StudyCell], tracker: Tracker | None = None) -> None:
    """Train every cell that is not over; one that fails is written down, and the others go on.

    Whatever it failed of: scores that are not finite, or a GPU's memory.
    """
    todo = [cell for cell in planned if not cell.over]
    with Progress() as progress:
        bar = progress.bar(f"training {Path(config.out).name}", len(todo), "cells")
        for cell in todo:
            bar.describe(f"training {cell.name}")

            def note(epoch: Epoch, cell: StudyCell = cell) -> None:
                if tracker:
                    tracker.epochs(cell, [vars(epoch)])

            try:
                run_cell(cell, load(cell.config), on_epoch=note)
            except Stopped:
                raise
            except Exception as error:
                cell.failed(in_one_line(error))
            else:
                (cell.folder / FAILED).unlink(missing_ok=True)
            if tracker:
                tracker.end(cell)
            bar.advance()


def run_cell(
    cell: StudyCell, source: DataSource, *, on_epoch: Callable[[Epoch], None] | None = None
) -> dict[str, Any]:
    """Train a cell, or find it finished; return its result. `source` is what `load` gave."""
    config, folder = cell.config, cell.folder
    if (folder / RESULT).is_file():
        result = cell.result()
        sets.check_found(result.get("data_fingerprint"), source, folder)
        return result
    identity.tell_of_former(lambda: cell.folder, RESULT)
    train_cell(
        ready(cell, source),
        settings(cell),
        source,
        lambda model, steps: PlainStepper(model, config.training, steps),
        device=str(zoo.choose_device(config.device)),
        on_epoch=on_epoch,
        wait=True,
    )
    return cell.result()


def ready(cell: StudyCell, source: DataSource) -> Cell:
    """Return a cell with its ticket, ready to be trained."""
    ticket = ticket_of(cell, source)
    return Cell(cell.name, ticket, cell.config.data, cell.seed, cell.folder)


def settings(cell: StudyCell) -> SparseTrainConfig:
    """Return how a cell is trained."""
    return SparseTrainConfig(training=cell.config.training, seed=cell.seed)


_SOURCES: dict[Any, DataSource] = {}


def load(config: StudyConfig) -> DataSource:
    """Return a study's data on its device; those used last are kept."""
    key = (run_id(config.data), str(config.data), config.device)
    if key not in _SOURCES:
        _SOURCES.clear()
        _SOURCES[key] = sets.load(config.data).to(zoo.choose_device(config.device))
    return _SOURCES[key]
