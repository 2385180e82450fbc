"""Ids of settings, made of what differs from the first defaults, and settings as plain data.

Nothing here imports torch, so that `autosparse --help` stays quick.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import field
from typing import Any

from autosparse.core.errors import unknown

FIRST_DEFAULTS: dict[str, Any] = {}
"""Where a default has changed: "TrainingConfig.epochs" -> its first value.

A run's id leaves out every value that equals the first default, even if today's differs. So
earlier runs keep their ids, and none is mistaken for a run with the new default. A new field that
changes results also gets an entry: the value that reproduces what was computed before the field
existed.
"""


def local(default: Any) -> Any:
    """Declare a field that does not change results (a place, a speed): it is left out of run_id."""
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata={"identity": False})
    return field(default=default, metadata={"identity": False})


def identity(config: Any) -> dict[str, Any]:
    """Return what differs from the first defaults, as nested plain data, local fields left out."""
    different = {}
    for spec in dataclasses.fields(config):
        rule = spec.metadata.get("identity", True)
        if rule is False:
            continue
        value = rule(config) if callable(rule) else getattr(config, spec.name)
        default = first_default(type(config), spec)
        if dataclasses.is_dataclass(value):
            inner = identity(value)
            if inner or default is None:
                different[spec.name] = inner
        elif value != default:
            different[spec.name] = _canonical(value)
    return different


def _canonical(value: Any) -> Any:
    """Make equal values look the same in JSON: 1.0 as 1, dataclasses in lists as their identity."""
    if dataclasses.is_dataclass(value):
        return identity(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list | tuple):
        return [_canonical(each) for each in value]
    if isinstance(value, dict):
        return {key: _canonical(each) for key, each in value.items()}
    return value


def first_default(kind: type, spec: dataclasses.Field) -> Any:
    """Return the default that a field had in its first version."""
    name = f"{kind.__name__}.{spec.name}"
    if name in FIRST_DEFAULTS:
        return FIRST_DEFAULTS[name]
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory()
    return spec.default


def run_id(config: Any, *more: str) -> str:
    """Return 12 hex digits that name a run: the hash of what differs from the first defaults.

    `more` holds other things that the run depends on, such as a ticket's content hash.
    """
    text = json.dumps([type(config).__name__, identity(config), *more], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def plain(config: Any) -> dict[str, Any]:
    """Return the whole config as nested plain data (for cards and MLflow)."""
    return dataclasses.asdict(config)


def from_plain(kind: type, values: dict[str, Any]) -> Any:
    """Build a flat config dataclass of `kind` from plain data; refuses unknown keys."""
    names = {spec.name for spec in dataclasses.fields(kind)}
    for key in values:
        if key not in names:
            raise unknown(f"{kind.__name__} key", key, names)
    return kind(**values)
