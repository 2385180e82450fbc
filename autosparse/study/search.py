"""Cells that Optuna chooses: each begins with a file that says what was suggested.

Every model and sparsity is searched by itself (a part). Which suggestions were begun is read from
the folders of their cells, so a search that was killed goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from autosparse.core.config import run_id
from autosparse.core.errors import UsageError
from autosparse.core.files import read_json, write_json
from autosparse.study import axes, labels
from autosparse.study.config import StudyConfig
from autosparse.study.grid import StudyCell, models, settled

POINT = "point.json"


def check(config: StudyConfig) -> None:
    """Raise UsageError for settings of a search that are wrong."""
    if config.twins:
        raise UsageError("search optuna takes no twins: controls are for the cells of a grid")
    if config.variations != [{}] or config.axes:
        raise UsageError("search optuna takes `space`; `variations` and `axes` are for a grid")
    if config.samples < 1:
        raise UsageError(f"samples must be at least 1, got {config.samples}")
    for key, values in config.space.items():
        axes.check_key(key, "space")
        if isinstance(values, list) and values:
            continue
        if not isinstance(values, dict) or not {"low", "high"} <= set(values) <= {
            "low", "high", "log"
        }:  # fmt: skip
            raise UsageError(
                f"space.{key} must be a list of choices or {{low: …, high: …, log: true}}"
            )


def samples(config: StudyConfig) -> int:
    """Return how many cells of each model and sparsity: no more than there are to choose from."""
    choices = [labels.labels(config), *config.space.values()]
    if not all(isinstance(each, list) for each in choices):
        return config.samples
    return min(config.samples, math.prod(map(_distinct, choices)))


def _distinct(choices: list[Any]) -> int:
    return len({json.dumps(each, sort_keys=True) for each in choices})


def offered(config: StudyConfig) -> list[axes.Point]:
    """Return a point for every choice of the space, and both ends of every range, one at a time."""
    single: list[axes.Point] = [{}]
    for key, values in config.space.items():
        ends = values if isinstance(values, list) else [values["low"], values["high"]]
        single += [{key: value} for value in ends]
    return single


def parts(config: StudyConfig) -> list[tuple[int, float]]:
    """Return (place of the model, sparsity) of every part."""
    return [
        (model, sparsity)
        for model in range(len(models(config)))
        for sparsity in labels.sparsities(config)
    ]


def suggested(config: StudyConfig, model: int, sparsity: float, point: dict[str, Any]) -> StudyCell:
    """Return the cell of a suggestion: a label and values of settings.

    A hash of the suggestion chooses its seed, so that the search cannot select lucky seeds.
    """
    values = {key: value for key, value in point.items() if key != "label"}
    whole = settled(config, model, values)
    seeds = labels.seeds(whole)
    digest = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).digest()
    seed = seeds[digest[0] % len(seeds)]
    return StudyCell(whole, point["label"], labels.TICKET, sparsity, seed, values)


def points(config: StudyConfig, model: int, sparsity: float) -> list[dict[str, Any]]:
    """Return the suggestions of a part that were begun, from their folders."""
    part = _part(config, model, sparsity)
    written = []
    for path in sorted((Path(config.out) / "cells").glob(f"*/{POINT}")):
        record = read_json(path)
        if record["study"] == part:
            cell = suggested(config, model, sparsity, record["point"])
            if cell.folder == path.parent:
                written.append(record["point"])
    return written


def begun(config: StudyConfig, model: int, sparsity: float) -> list[StudyCell]:
    """Return the cells of a part that were begun."""
    return [suggested(config, model, sparsity, each) for each in points(config, model, sparsity)]


def write_point(
    config: StudyConfig, model: int, sparsity: float, point: dict[str, Any]
) -> StudyCell:
    """Write down a suggestion before its cell is trained; return the cell."""
    cell = suggested(config, model, sparsity, point)
    record = {"study": _part(config, model, sparsity), "point": point}
    write_json(cell.folder / POINT, record)
    return cell


def _part(config: StudyConfig, model: int, sparsity: float) -> str:
    return run_id(models(config)[model], f"{sparsity:g}", str(sorted(config.space)))
