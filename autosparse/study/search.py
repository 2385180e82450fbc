"""Cells that Optuna chooses: each begins with a file that says what was suggested.

A search has a part for every model and sparsity; parts share nothing. What was begun is found in
the folders of its cells, so a search that was killed goes on.
"""

from __future__ import annotations

import hashlib
import json
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
    """Raise UsageError for a search that cannot be."""
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


def offered(config: StudyConfig) -> list[axes.Point]:
    """Return a point for every choice of the space, and both ends of every range, one at a time."""
    found: list[axes.Point] = [{}]
    for key, values in config.space.items():
        ends = values if isinstance(values, list) else [values["low"], values["high"]]
        found += [{key: value} for value in ends]
    return found


def parts(config: StudyConfig) -> list[tuple[int, float]]:
    """Return (place of the model, sparsity) of every part."""
    return [
        (model, sparsity)
        for model in range(len(models(config)))
        for sparsity in labels.sparsities(config)
    ]


def suggested(config: StudyConfig, model: int, sparsity: float, point: dict[str, Any]) -> StudyCell:
    """Return the cell of a suggestion: a label and values of settings.

    The seed follows from the suggestion: the search must not pick lucky ones.
    """
    values = {key: value for key, value in point.items() if key != "label"}
    found = settled(config, model, values)
    seeds = labels.seeds(found)
    digest = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).digest()
    seed = seeds[digest[0] % len(seeds)]
    return StudyCell(found, point["label"], labels.TICKET, sparsity, seed, values)


def points(config: StudyConfig, model: int, sparsity: float) -> list[dict[str, Any]]:
    """Return the suggestions of a part that were begun, from their folders."""
    part = _part(config, model, sparsity)
    found = []
    for path in sorted((Path(config.out) / "cells").glob(f"*/{POINT}")):
        record = read_json(path)
        if record["study"] == part:
            cell = suggested(config, model, sparsity, record["point"])
            if cell.folder == path.parent:
                found.append(record["point"])
    return found


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
