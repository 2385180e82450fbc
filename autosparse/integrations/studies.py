"""A study from beginning to end: what is over is found, the rest is trained and logged.

Every way in (`autosparse compare`, `ray_jobs/sweep_sparsity.py`) comes here; who trains the cells
is `executor`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autosparse.core.config import run_id
from autosparse.core.errors import RunFailed
from autosparse.core.files import place
from autosparse.core.locks import claimed
from autosparse.data import sets
from autosparse.study import local, plan
from autosparse.study.config import StudyConfig
from autosparse.study.grid import DEEPSPEED, LOCAL, RAY, StudyCell


@dataclass
class Done:
    """What `run` did."""

    folder: Path
    cells: list[StudyCell]
    """All cells of the study."""
    found: list[str]
    """Cells that were over before."""


def output_folder(config: StudyConfig) -> Path:
    """Return where the results go; a job of Ray's has a place of its own for relative paths."""
    if config.executor == RAY:
        from autosparse.integrations import ray

        return ray.output_folder(config.out)
    return place(config.out).absolute()


def run(config: StudyConfig) -> Done:
    """Train every cell that is not over; one that fails does not stop the others."""
    plan.check(config)
    folder = output_folder(config)
    config = replace(config, out=str(folder))
    plan.check_whole(config)
    planned = plan.cells(config)
    over_before = [cell for cell in planned if cell.over]
    _check_data(over_before)
    execute = _executor(config)
    with claimed(folder), _tracked(config, folder) as tracker:
        if tracker:
            tracker.catch_up(over_before)
        if plan.left(config, planned):
            execute(config, planned, tracker)
        return Done(folder, plan.cells(config), [cell.key for cell in over_before])


def _check_data(over: list[StudyCell]) -> None:
    """Raise UsageError where a finished cell is of other data of the same name."""
    for data in {run_id(cell.config.data): cell.config.data for cell in over}.values():
        source = sets.if_there(data)
        for cell in over if source else ():
            if cell.config.data == data and cell.state == "finished":
                sets.check_found(cell.result().get("data_fingerprint"), source, cell.folder)


def _executor(config: StudyConfig) -> Callable[[StudyConfig, list[StudyCell], Any], None]:
    """Return what trains the cells; raise UsageError where something is not installed."""
    if config.executor == LOCAL:
        return local.run
    if config.executor == DEEPSPEED:
        from autosparse.integrations import launched

        return launched.run
    from autosparse.integrations import tune

    if config.search == plan.OPTUNA:
        tune.optuna_search()
    return tune.run


def _tracked(config: StudyConfig, folder: Path) -> AbstractContextManager[Any]:
    """Return a context that gives a tracker which logs to MLflow, or None."""
    if not config.tracking:
        return nullcontext()
    from autosparse.integrations.tracking import study_tracker

    return study_tracker(config, folder)


def raise_if_failed(done: Done) -> None:
    """Raise RunFailed that names the cells that failed."""
    failed = [cell.key for cell in done.cells if not cell.over]
    if failed:
        raise RunFailed(
            f"{len(failed)} of {len(done.cells)} cells failed: {', '.join(failed)}; "
            "the same command tries them again"
        )
