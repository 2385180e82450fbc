"""A study before it runs: its cells, what is wrong with its settings, and its cost."""

from __future__ import annotations

from typing import Any

from autosparse.core.config import run_id
from autosparse.core.errors import UsageError, unknown
from autosparse.core.files import check_folder, is_local
from autosparse.criteria import scoring
from autosparse.criteria.pruning import DENSE, check_model
from autosparse.data import sets
from autosparse.irp import plan
from autosparse.irp.config import IRPConfig
from autosparse.models import zoo
from autosparse.models.config import ModelConfig
from autosparse.study import axes, grid, labels, search
from autosparse.study.config import StudyConfig
from autosparse.study.grid import DEEPSPEED, LOCAL, RAY, StudyCell, models, settled
from autosparse.training.checks import check as check_training
from autosparse.training.checks import check_plain
from autosparse.training.loop import training_images
from autosparse.training.topology.gradual import SCHEDULES

EXECUTORS = (LOCAL, RAY, DEEPSPEED)
GRID, OPTUNA = SEARCHES = ("grid", "optuna")


def cells(config: StudyConfig) -> list[StudyCell]:
    """Return the cells of a grid; of an Optuna search the dense ones and those it has begun."""
    check(config)
    planned = list(grid.cells(config))
    if config.search == OPTUNA:
        planned = [cell for cell in planned if cell.label == DENSE]
        planned += [cell for part in search.parts(config) for cell in search.begun(config, *part)]
    unique: dict[str, StudyCell] = {}
    for cell in planned:
        unique.setdefault(cell.key, cell)
    return list(unique.values())


def left(config: StudyConfig, planned: list[StudyCell]) -> int:
    """Return how many cells are to be done, those that a search has yet to choose included."""
    if config.search == GRID:
        return sum(not cell.over for cell in planned)
    todo = sum(not cell.over for cell in planned if cell.label == DENSE)
    wanted = search.samples(config)
    for part in search.parts(config):
        todo += max(wanted - sum(cell.over for cell in search.begun(config, *part)), 0)
    return todo


def check(config: StudyConfig) -> None:
    """Raise UsageError for settings that are wrong, before anything is trained."""
    if config.executor not in EXECUTORS:
        raise unknown("executor", config.executor, EXECUTORS)
    if config.search not in SEARCHES:
        raise unknown("search", config.search, SEARCHES)
    if not is_local(config.out):
        raise UsageError(f"out {config.out}: a study needs a folder that all nodes share, no URL")
    if config.models and config.model != ModelConfig():
        raise UsageError(f"model {config.model.name} and models are both given; leave out one")
    _check_asha(config)
    axes.check(config)
    if config.search == OPTUNA:
        search.check(config)
    elif config.space:
        raise UsageError("search grid takes `variations`; `space` is for search optuna")
    for each in _settled(config):
        check_training(each.training)
        if each.training.topology in SCHEDULES:
            raise UsageError(
                f"training.topology {each.training.topology} begins with the dense model, and a "
                "study trains tickets; compare it by `autosparse train --model.name …`"
            )
        if config.executor != DEEPSPEED:
            check_plain(each.training)
        elif each.training.precision == "fp16":
            raise UsageError(
                "executor deepspeed trains under ZeRO 1, where training.precision fp16 does not "
                "work; use bf16"
            )
        labels.selection(each).check()
        scoring.check_scoring(each.scoring)
        labels.check(each)


def _check_asha(config: StudyConfig) -> None:
    if config.executor != RAY and (config.asha or config.search == OPTUNA):
        raise UsageError("asha and search optuna are Ray Tune's: set executor to ray")
    if config.asha and any(twin not in labels.BASELINES for twin in config.twins):
        raise UsageError("asha would stop controls early; set twins to [] (or [erk, uniform])")
    if config.asha and (config.asha_epochs < 1 or config.asha_factor < 2):
        raise UsageError("asha_epochs must be at least 1, asha_factor at least 2")


def _settled(config: StudyConfig) -> list[StudyConfig]:
    """Return the study at every point that it may have, for each of its models.

    Of a search, these are the points that differ from the study in one setting only.
    """
    points = search.offered(config) if config.search == OPTUNA else axes.points(config)
    return [
        settled(config, model, point) for model in range(len(models(config))) for point in points
    ]


def check_whole(config: StudyConfig) -> None:
    """Raise UsageError for all that the settings alone show to be wrong, before work begins.

    Where Ray runs the cells, GPUs are looked for there.
    """
    check(config)
    check_folder(config.out)
    if config.executor == LOCAL:
        zoo.choose_device(config.device)
    kinds = {(run_id(each.model), run_id(each.data)): each for each in _settled(config)}
    for each in kinds.values():
        check_model(each.model, each.data)


def dry_run(config: StudyConfig) -> tuple[list[dict[str, Any]], str]:
    """Return a row per model, point, criterion and sparsity, and in one line what is left."""
    with sets.remembered():
        return _dry_run(config)


def _dry_run(config: StudyConfig) -> tuple[list[dict[str, Any]], str]:
    planned, cost = cells(config), _Cost()
    groups: dict[tuple, list[StudyCell]] = {}
    for cell in planned:
        if config.search == GRID or cell.label == DENSE:
            key = (run_id(cell.config.model), str(cell.point), cell.sparsity, cell.label)
            groups.setdefault(key, []).append(cell)
    rows, seconds = [], 0.0
    for (_, _, sparsity, label), mine in groups.items():
        model, training = mine[0].config.model.name, axes.shown(mine[0].point)
        spent = sum(cost.seconds(cell) for cell in mine if not cell.over)
        seconds += spent
        place = {"model": model, "training": training or "-", "at %": f"{100 * sparsity:g}"}
        rows.append({**place, "criterion": label, **_states(mine, len(mine), spent)})
    for number, sparsity in search.parts(config) if config.search == OPTUNA else ():
        mine = search.begun(config, number, sparsity)
        wanted = search.samples(config)
        rest = max(wanted - sum(cell.over for cell in mine), 0)
        first = settled(config, number, {})
        some = StudyCell(first, labels.labels(first)[0], labels.TICKET, sparsity, 0)
        spent = rest * cost.seconds(some)
        seconds += spent
        place = {"model": first.model.name, "training": "optuna", "at %": f"{100 * sparsity:g}"}
        rows.append({**place, "criterion": "optuna", **_states(mine, wanted, spent)})
    total, todo = sum(row["cells"] for row in rows), left(config, planned)
    unit = "GPU" if config.gpus_per_trial else "CPU"
    per_cell = config.gpus_per_trial or config.cpus_per_trial
    most = " at most (ASHA stops some early)" if config.asha else ""
    return rows, (
        f"{total} cells, {total - todo} over, {todo} to do: about "
        f"{seconds * per_cell / 3600:.2f} {unit} hours{most}"
    )


def _states(mine: list[StudyCell], total: int, seconds: float) -> dict[str, Any]:
    states = [cell.state for cell in mine]
    counts = {state: states.count(state) for state in ("finished", "stopped", "failed")}
    return {"cells": total, **counts, "minutes left": f"{seconds / 60:.1f}"}


class _Cost:
    """Estimates the seconds of cells from a few steps of each dense model, timed once."""

    def __init__(self) -> None:
        self.per_image: dict[str, float] = {}

    def seconds(self, cell: StudyCell) -> float:
        """Return about how long a cell takes; `irp` trains once per level before."""
        config = cell.config
        source = sets.load(config.data)
        key = run_id(config.model, run_id(config.data))
        if key not in self.per_image:
            dense = zoo.create_for(source, config.model, 0)
            self.per_image[key] = plan.probed(
                dense, source, config.training, config.device, config.cpus_per_trial
            )
        name, options = labels.criterion_of(config, cell.label)
        trainings = 1 + (options.get("levels", IRPConfig.levels) + 1 if name == labels.IRP else 0)
        images = training_images(source.train, config.training)
        return images * trainings * self.per_image[key]
