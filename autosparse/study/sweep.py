"""A sweep: cells over models, criteria, sparsities, seeds and training options, and their table.

A cell is a trial of a comparison (see compare.py): the same code trains it and finds it again by
its folder. Only which cells there are, and what became of them, is said here; integrations/tune.py
runs them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autosparse.core.config import from_plain, plain, run_id
from autosparse.core.errors import UsageError, unknown
from autosparse.core.files import check_folder, is_local, read_json, write_json
from autosparse.core.versions import library_versions
from autosparse.criteria.prune import DENSE, check_model
from autosparse.data import sets
from autosparse.data.sets import DataSource
from autosparse.irp import plan
from autosparse.models import zoo
from autosparse.study import compare, verdicts
from autosparse.study.compare import TICKET, Trial
from autosparse.study.config import CompareConfig, SweepConfig
from autosparse.study.trainings import RESULT
from autosparse.training.config import TrainingConfig
from autosparse.training.loop import steps_per_epoch
from autosparse.training.steppers import check_plain

SEARCHES = ("grid", "optuna")
POINT, STOPPED, FAILED, REPORT = "point.json", "stopped.json", "failed.json", "sweep.json"
GRID, OPTUNA = SEARCHES


@dataclass(frozen=True)
class SweepCell:
    """One training of a sweep."""

    config: CompareConfig
    """The comparison that it is a trial of: its model and training options."""
    trial: Trial
    variation: dict[str, Any]
    """What differs from the sweep's training options."""
    stoppable: bool = False
    """Whether ASHA may stop it."""

    @property
    def folder(self) -> Path:
        """Where its result goes."""
        return compare.folder_of(self.config, self.trial)

    @property
    def key(self) -> str:
        """Its name, with a hash of all that makes it."""
        return self.folder.name

    @property
    def group(self) -> tuple[str, float, int]:
        """Model, sparsity and seed: what ASHA never holds against another."""
        return run_id(self.config.model), self.trial.sparsity, self.trial.seed

    @property
    def state(self) -> str:
        """Return finished, stopped (by ASHA), failed or to do."""
        if (self.folder / RESULT).is_file():
            return "finished"
        if self.stoppable and (self.folder / STOPPED).is_file():
            return "stopped"
        return "failed" if (self.folder / FAILED).is_file() else "to do"

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do; what failed is tried again."""
        return self.state in ("finished", "stopped")

    def result(self) -> dict[str, Any]:
        """Return the result of a finished cell, with its place in the comparison."""
        trial = self.trial
        place = {"label": trial.label, "twin": trial.twin, "sparsity": trial.sparsity}
        return {**read_json(self.folder / RESULT), **place}

    def history(self) -> list[dict[str, Any]]:
        """Return the epochs of a finished or stopped cell."""
        file = RESULT if (self.folder / RESULT).is_file() else STOPPED
        return read_json(self.folder / file)["history"]


def shown_variation(variation: dict[str, Any]) -> str:
    """Return training options in a line."""
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in variation.items()
    )


def check(config: SweepConfig) -> None:
    """Raise UsageError for what cannot be, before anything is trained."""
    if config.search not in SEARCHES:
        raise unknown("search", config.search, SEARCHES)
    if not is_local(config.out):
        raise UsageError(f"out {config.out}: a sweep needs a folder that all nodes share, no URL")
    if not config.models:
        raise UsageError("models is empty: a sweep needs one")
    if config.search == OPTUNA and config.twins:
        raise UsageError("search optuna takes no twins: controls are for the cells of a grid")
    if config.search == OPTUNA and config.variations != [{}]:
        raise UsageError("search optuna takes `space`; `variations` are for a grid")
    if config.search == GRID and config.space:
        raise UsageError("search grid takes `variations`; `space` is for search optuna")
    if config.search == OPTUNA and config.samples < 1:
        raise UsageError(f"samples must be at least 1, got {config.samples}")
    if config.asha and any(twin not in compare.BASELINES for twin in config.twins):
        raise UsageError("asha would stop controls early; set twins to [] (or [erk, uniform])")
    if config.asha and (config.asha_epochs < 1 or config.asha_factor < 2):
        raise UsageError("asha_epochs must be at least 1, asha_factor at least 2")
    for variation in config.variations:
        for key in variation:
            _known_option(key, "variations")
    for key, values in config.space.items():
        _known_option(key, "space")
        _check_space(key, values)
    for comparison, _ in comparisons(config):
        compare.check_config(comparison)
        check_plain(comparison.training)


def check_whole(config: SweepConfig) -> None:
    """Raise UsageError for all that the settings alone show to be wrong, before work begins.

    GPUs are looked for where cells run.
    """
    check(config)
    check_folder(config.out)
    for model in config.models:
        check_model(model, config.data)


def _known_option(key: str, where: str) -> None:
    known = [name for name in TrainingConfig.__dataclass_fields__ if name != "checkpoint_epochs"]
    if key not in known:
        raise unknown(f"training option in {where}", key, known)


def _check_space(key: str, values: Any) -> None:
    if isinstance(values, list) and values:
        return
    if isinstance(values, dict) and {"low", "high"} <= set(values) <= {"low", "high", "log"}:
        return
    raise UsageError(f"space.{key} must be a list of choices or {{low: …, high: …, log: true}}")


def comparison(config: SweepConfig, model: int, variation: dict[str, Any]) -> CompareConfig:
    """Return the comparison of one model with some training options."""
    training = from_plain(TrainingConfig, {**plain(config.training), **variation})
    same = ("data", "criteria", "options", "sparsities", "seeds", "twins", "scope", "allocation",
            "allocation_options", "guard", "scoring")  # fmt: skip
    return CompareConfig(
        model=config.models[model], training=training, tracking=False,
        out=str(Path(config.out).absolute()),
        device="cuda" if config.gpus_per_trial else "cpu",
        **{name: getattr(config, name) for name in same},
    )  # fmt: skip


def comparisons(config: SweepConfig) -> Iterator[tuple[CompareConfig, dict[str, Any]]]:
    """Yield a comparison per model and variation."""
    for model in range(len(config.models)):
        for variation in config.variations:
            yield comparison(config, model, variation), variation


def cells(config: SweepConfig) -> list[SweepCell]:
    """Return the cells of a grid; of an Optuna search the dense ones and those it has begun."""
    check(config)
    found = [
        SweepCell(compared, trial, variation, config.asha)
        for compared, variation in comparisons(config)
        for trial in compare.trials(compared)
        if config.search == GRID or trial.label == DENSE
    ]
    if config.search == OPTUNA:
        found += [cell for study in studies(config) for cell in begun(config, *study)]
    return list({cell.key: cell for cell in found}.values())


# Optuna


def studies(config: SweepConfig) -> list[tuple[int, float]]:
    """Return (place of the model, sparsity) of every study: they share nothing."""
    first = comparison(config, 0, {})
    return [
        (model, sparsity)
        for model in range(len(config.models))
        for sparsity in compare.sparsities(first)
    ]


def suggested(config: SweepConfig, model: int, sparsity: float, point: dict[str, Any]) -> SweepCell:
    """Return the cell of a suggestion: a label and training options.

    The seed follows from the suggestion: the search must not pick lucky ones.
    """
    variation = {key: value for key, value in point.items() if key != "label"}
    found = comparison(config, model, variation)
    seeds = compare.seeds(found)
    digest = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).digest()
    trial = Trial(point["label"], TICKET, sparsity, seeds[digest[0] % len(seeds)])
    return SweepCell(found, trial, variation, config.asha)


def points(config: SweepConfig, model: int, sparsity: float) -> list[dict[str, Any]]:
    """Return the suggestions of a study that were begun, from their folders."""
    study = _study(config, model, sparsity)
    found = []
    for path in sorted((Path(config.out).absolute() / "cells").glob(f"*/{POINT}")):
        record = read_json(path)
        if record["study"] == study:
            cell = suggested(config, model, sparsity, record["point"])
            if cell.folder == path.parent:
                found.append(record["point"])
    return found


def begun(config: SweepConfig, model: int, sparsity: float) -> list[SweepCell]:
    """Return the cells of a study that were begun."""
    return [suggested(config, model, sparsity, each) for each in points(config, model, sparsity)]


def write_point(
    config: SweepConfig, model: int, sparsity: float, point: dict[str, Any]
) -> SweepCell:
    """Write down a suggestion before its cell is trained; return the cell."""
    cell = suggested(config, model, sparsity, point)
    record = {"study": _study(config, model, sparsity), "point": point}
    write_json(cell.folder / POINT, record)
    return cell


def _study(config: SweepConfig, model: int, sparsity: float) -> str:
    return run_id(config.models[model], f"{sparsity:g}", str(sorted(config.space)))


# What became of them


def dry_run(config: SweepConfig) -> tuple[list[dict[str, Any]], str]:
    """Return a row per model, criterion and sparsity, and in one line what the rest costs."""
    known = cells(config)
    if config.search == OPTUNA:
        known = [cell for cell in known if cell.trial.label == DENSE]
    per_image = _seconds_per_image(config)
    groups: dict[tuple, list[SweepCell]] = {}
    for cell in known:
        trial = cell.trial
        key = (cell.config.model.name, shown_variation(cell.variation), trial.sparsity, trial.label)
        groups.setdefault(key, []).append(cell)
    rows, seconds, left = [], 0.0, 0
    for (model, variation, sparsity, label), mine in groups.items():
        todo = [cell for cell in mine if not cell.over]
        cost = sum(_passes(config, cell) * per_image[model] for cell in todo)
        seconds, left = seconds + cost, left + len(todo)
        states = [cell.state for cell in mine]
        rows.append({
            "model": model, "training": variation or "-", "at %": f"{100 * sparsity:g}",
            "criterion": label, "cells": len(mine),
            "finished": states.count("finished"), "stopped": states.count("stopped"),
            "failed": states.count("failed"), "minutes left": f"{cost / 60:.1f}",
        })  # fmt: skip
    total = len(known)
    if config.search == OPTUNA:
        for model, sparsity in studies(config):
            mine = begun(config, model, sparsity)
            over = sum(cell.over for cell in mine)
            rest = max(config.samples - over, 0)
            name = config.models[model].name
            cost = rest * _epochs_passes(config) * per_image[name]
            seconds, left, total = seconds + cost, left + rest, total + config.samples
            rows.append({
                "model": name, "training": "optuna", "at %": f"{100 * sparsity:g}",
                "criterion": "optuna", "cells": config.samples,
                "finished": sum(cell.state == "finished" for cell in mine),
                "stopped": sum(cell.state == "stopped" for cell in mine),
                "failed": sum(cell.state == "failed" for cell in mine),
                "minutes left": f"{cost / 60:.1f}",
            })  # fmt: skip
    unit = "GPU" if config.gpus_per_trial else "CPU"
    per_cell = config.gpus_per_trial or config.cpus_per_trial
    most = " at most (ASHA stops some early)" if config.asha else ""
    return rows, (
        f"{total} cells, {total - left} over, {left} to do: about "
        f"{seconds * per_cell / 3600:.2f} {unit} hours{most}"
    )


def _seconds_per_image(config: SweepConfig) -> dict[str, float]:
    """Return a training's seconds per image, by model, from a few steps of the dense one."""
    source = sets.load(config.data)
    found = {}
    for number, model in enumerate(config.models):
        settings = comparison(config, number, {})
        dense = zoo.create_for(source, model, 0)
        found[model.name] = plan.probed(
            dense, source, settings.training, settings.device, config.cpus_per_trial
        )
    return found


def _passes(config: SweepConfig, cell: SweepCell) -> float:
    """Return the image passes of a cell: its training, and for `irp` one per level before it."""
    name, options = compare.criterion_of(cell.config, cell.trial.label)
    trainings = 1 + (options.get("levels", 6) + 1 if name == compare.IRP else 0)
    return _epochs_passes(config, cell.config.training) * trainings


def _epochs_passes(config: SweepConfig, training: TrainingConfig | None = None) -> float:
    training = training or config.training
    source = sets.load(config.data)
    return steps_per_epoch(source.train, training) * training.batch_size * training.epochs


def table(config: SweepConfig, found: list[SweepCell], source: DataSource) -> list[dict[str, Any]]:
    """Return `verdicts.table`'s rows for the finished cells, with model and training options."""
    groups: dict[tuple[str, str], list[SweepCell]] = {}
    for cell in found:
        if cell.state == "finished":
            key = (run_id(cell.config.model), shown_variation(cell.variation))
            groups.setdefault(key, []).append(cell)
    rows = []
    for mine in groups.values():
        settings = mine[0].config
        passes = verdicts.training_passes(settings, source)
        for row in verdicts.table(settings, [cell.result() for cell in mine], passes):
            place = {"model": settings.model.name, "training": shown_variation(mine[0].variation)}
            rows.append({**place, **row})
    names = [model.name for model in config.models]
    return sorted(rows, key=lambda row: (names.index(row["model"]), row["sparsity"]))


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return of each model, label and sparsity the row with the best validation accuracy."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        key = (row["model"], row["label"], row["sparsity"])
        if key not in found or row["validation_accuracy"] > found[key]["validation_accuracy"]:
            found[key] = row
    return list(found.values())


def best_cells(report: dict[str, Any]) -> list[tuple[str, float, dict[str, Any]]]:
    """Return (model, sparsity, result) of the best ticket of each, by validation accuracy.

    `report` is the content of sweep.json; dense networks and twins do not compete.
    """
    best: dict[tuple[str, float], dict[str, Any]] = {}
    for result in report["results"]:
        if result["twin"] == TICKET and result["label"] != DENSE:
            key = (result["model"], result["sparsity"])
            before = best.get(key)
            if not before or result["validation_accuracy"] > before["validation_accuracy"]:
                best[key] = result
    return [(model, sparsity, result) for (model, sparsity), result in sorted(best.items())]


def shown(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the table's rows as they are printed; columns that say nothing are left out."""
    several = {key: len({row[key] for row in rows}) > 1 for key in ("model", "training")}
    lines = [
        {key: row[key] or "-" for key in several if several[key]} | line
        for row, line in zip(rows, verdicts.shown(rows), strict=True)
    ]
    empty = {key for key in (lines[0] if lines else {}) if all(
        line[key] in ("", "no twins") for line in lines)}  # fmt: skip
    for line in lines:
        yield {key: value for key, value in line.items() if key not in empty}


def write_report(config: SweepConfig, rows: list[dict[str, Any]], found: list[SweepCell]) -> Path:
    """Write sweep.json: config, table, every result without its history, and what is missing."""
    path = Path(config.out).absolute() / REPORT
    done = [cell for cell in found if cell.state == "finished"]
    results = [
        {key: value for key, value in cell.result().items() if key != "history"}
        | {"cell": cell.key, "model": cell.config.model.name,
           "training": shown_variation(cell.variation)}
        for cell in done
    ]  # fmt: skip
    write_json(path, {
        "config": plain(replace(config, out="")),
        "rows": rows,
        "results": results,
        "stopped": [
            {"cell": cell.key, "epochs": len(cell.history())}
            for cell in found if cell.state == "stopped"
        ],
        "failed": failures(found),
        "versions": library_versions(),
    })  # fmt: skip
    return path


def failures(found: list[SweepCell]) -> dict[str, str]:
    """Return cell -> error of what failed."""
    return {
        cell.key: read_json(cell.folder / FAILED)["error"]
        for cell in found
        if cell.state == "failed"
    }
