"""Axes: dotted configuration keys, each with the values that a study tries.

A point gives some keys a value, e.g. {"training.learning_rate": 0.01}. A key without a dot is
one of `training`. Criteria, sparsities, seeds, twins and models are axes with lists of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from autosparse.core.config import from_plain
from autosparse.core.errors import UsageError, unknown
from autosparse.study.config import StudyConfig
from autosparse.training.config import TrainingConfig

Point = dict[str, Any]
ROOTS = ("model", "data", "training", "scoring", "options", "scope", "allocation",
         "allocation_options", "guard", "units")  # fmt: skip
"""Settings that a cell's result depends on: they are part of its folder's hash."""
TRAINING = [spec.name for spec in fields(TrainingConfig) if spec.metadata.get("identity", True)]


def points(config: StudyConfig) -> list[Point]:
    """Return the points of a grid: every variation with every combination of the axes' values."""
    products = itertools.product(*config.axes.values())
    combinations = [dict(zip(config.axes, values, strict=True)) for values in products]
    return [variation | each for variation in config.variations for each in combinations]


def at(config: StudyConfig, point: Point) -> StudyConfig:
    """Return the study with a point's values in place; raise UsageError for an unknown key."""
    for key, value in point.items():
        config = _with(config, _full(key), value, key)
    return config


def check(config: StudyConfig) -> None:
    """Raise UsageError for a key that is no axis, or values that are none."""
    for key, values in config.axes.items():
        check_key(key, "axes")
        if not isinstance(values, list) or not values:
            raise UsageError(f"axes.{key} must be a list of values, got {values!r}")
    for variation in config.variations:
        for key in variation:
            check_key(key, "variations")


def check_key(key: str, where: str) -> None:
    """Raise UsageError unless a key names a setting that makes another cell."""
    if key in TRAINING:
        return
    root, _, rest = key.partition(".")
    if root not in ROOTS:
        raise unknown(f"setting in {where}", key, [*ROOTS, *TRAINING])
    if root == "training" and rest and rest.partition(".")[0] not in TRAINING:
        raise unknown(f"training option in {where}", rest, TRAINING)


def shown(point: Point) -> str:
    """Return a point in a line; a model's name has a column of its own."""
    return ", ".join(
        f"{key.removeprefix('training.')} {value:.6g}"
        if isinstance(value, float)
        else f"{key.removeprefix('training.')} {value}"
        for key, value in point.items()
        if key != "model.name"
    )


def _full(key: str) -> str:
    """Return a key from the root on: `learning_rate` is `training.learning_rate`."""
    return key if key.partition(".")[0] in ROOTS else f"training.{key}"


def _with(settings: Any, key: str, value: Any, whole: str) -> Any:
    """Return settings (a dataclass, or a dict of options) with the value of a dotted key."""
    head, _, rest = key.partition(".")
    if isinstance(settings, dict):
        inner = _with(settings.get(head, {}), rest, value, whole) if rest else value
        return {**settings, head: inner}
    if not is_dataclass(settings) or isinstance(settings, type):
        raise UsageError(f"{whole}: there are no settings below {settings!r}")
    names = [spec.name for spec in fields(settings)]
    if head not in names:
        raise unknown(f"setting of {type(settings).__name__}", head, names)
    now = getattr(settings, head)
    if rest:
        value = _with(now, rest, value, whole)
    elif is_dataclass(now) and isinstance(value, Mapping):
        value = from_plain(type(now), dict(value))
    return replace(settings, **{head: value})
