"""Ranges that numbers of the settings must lie in."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from autosparse.core.errors import UsageError

LIMITS = {
    "at least": operator.ge,
    "above": operator.gt,
    "at most": operator.le,
    "below": operator.lt,
}


def check_ranges(settings: Any, ranges: Mapping[str, str], prefix: str = "") -> None:
    """Raise UsageError that names the first field that is out of its range.

    Args:
        settings: whose attributes the fields are; None is not looked at.
        ranges: field -> range in words, such as "at least 0 and below 1" or "whole and above 0".
        prefix: before a field's name in the error.
    """
    for name, range_ in ranges.items():
        value = getattr(settings, name)
        if value is not None and not all(_is(value, part) for part in range_.split(" and ")):
            raise UsageError(f"{prefix}{name} must be {range_}, got {value}")


def _is(value: Any, part: str) -> bool:
    if not isinstance(value, int | float):
        return False
    if part == "whole":
        return isinstance(value, int)
    limit, number = part.rsplit(" ", 1)
    return LIMITS[limit](value, float(number))
