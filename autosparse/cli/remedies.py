"""Suggestions for mistyped option names and values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from autosparse.core.errors import UsageError, unknown

ALSO_CALLED = {
    "lr": "learning_rate", "rate": "learning_rate", "wd": "weight_decay", "decay": "weight_decay",
    "bs": "batch_size", "batch": "batch_size", "epoch": "epochs", "optim": "optimizer",
    "amp": "precision", "dtype": "precision", "workers": "data.workers", "dataset": "data.name",
    "arch": "model.name", "net": "model.name", "network": "model.name", "method": "criterion",
    "pruner": "criterion", "output": "out", "o": "out", "density": "sparsity",
}  # fmt: skip
"""What others call a setting -> its name here, where a verb has it."""
MOST_USED = ("tickets", "ticket", "corpus", "model.name")
"""What a word without an option is meant for, most likely: the first that the verb has."""


def unknown_key(name: str, keys: Mapping[str, Any]) -> UsageError:
    """Return the error for a dotted name that is no setting, with the one that was meant."""
    group, _, last = name.rpartition(".")
    meant = ALSO_CALLED.get(last, last)
    same = [key for key in keys if key == meant or key.endswith(f".{meant}")]
    same = [key for key in same if key.startswith(f"{group}.")] or same
    if same:
        there = " or ".join(f"'{key}'" for key in sorted(same, key=_depth)[:3])
        return UsageError(f"unknown config key {name!r}. Did you mean {there}?")
    inside = [key for key in keys if group and key.startswith(f"{group}.")]
    return unknown("config key", name, inside or keys)


def check_no_bare_word(program: str, arguments: Sequence[str], keys: Mapping[str, Any]) -> None:
    """Raise UsageError where a command that takes settings only begins with something else."""
    if not arguments or arguments[0].startswith("-"):
        return
    word = arguments[0]
    option = next((each for each in MOST_USED if each in keys), "KEY")
    raise UsageError(f"{word!r} has no option before it: write {program} --{option} {word}")


def _depth(key: str) -> tuple[int, str]:
    return key.count("."), key


def checked(name: str, hint: Any, value: str) -> str:
    """Return a value as the parser takes it: a list of one without its brackets gets them.

    Raises UsageError where the setting wants a number, true or false, or is a group of settings.
    """
    if hint in (int, float):
        _number(name, hint, value)
    elif hint is bool and not isinstance(_read(value), bool):
        raise UsageError(f"--{name} is true or false, got {value!r}")
    elif (kind := _settings_class(hint)) and not _mapping(value):
        first = "name" if any(each.name == "name" for each in fields(kind)) else "KEY"
        raise UsageError(f"--{name} is a group of settings: write --{name}.{first} {value}")
    elif get_origin(hint) is list and not (
        value.lstrip().startswith("[") or isinstance(_read(value), list)
    ):
        if _settings_class(*get_args(hint)) is not None:
            raise UsageError(f"--{name} is a list of groups: write '[{{name: {value}}}]'")
        if get_args(hint) == (str,):  # Patterns such as *.conv mean something else to YAML.
            return json.dumps([part.strip() for part in value.split(",")])
        return f"[{value}]"
    return value


def _read(value: str) -> Any:
    """Return what YAML takes a value for; the text where it is none."""
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def percent(value: str) -> str:
    """Return "; 95 % is 0.95" for a text that ends so, or ""."""
    try:
        share = float(value.rstrip("% ")) / 100
    except ValueError:
        return ""
    return f"; {value.rstrip('% ')} % is {share:g}" if value.endswith("%") else ""


def _number(name: str, kind: type, value: str) -> None:
    try:
        kind(value)
    except ValueError:
        read = _read(value)  # 0x10, .inf
        if isinstance(read, kind) and not isinstance(read, bool):
            return
        wanted = "a whole number" if kind is int else "a number"
        raise UsageError(f"--{name} is {wanted}, got {value!r}{percent(value)}") from None


def _settings_class(hint: Any) -> type | None:
    """Return the class of settings that a setting holds, alone or beside None."""
    if get_origin(hint) in (list, dict):
        return None
    classes = [each for each in (hint, *get_args(hint)) if is_dataclass(each)]
    return classes[0] if classes and isinstance(classes[0], type) else None


def _mapping(value: str) -> bool:
    return value.lstrip().startswith("{") or value in ("null", "None") or Path(value).is_file()
