"""Criteria: functions that score or choose weights at initialization. One file each.

`get("snip")(model, batches, loss_fn)` returns per prunable parameter a float tensor (higher =
keep), or a bool mask where the criterion `chooses`; `names()` lists them. To add one, add a file
with one registered function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autosparse.criteria.base import Criterion, Scores, get, names, register

__all__ = ["Criterion", "Scores", "get", "names", "register"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from autosparse.criteria import base

    return getattr(base, name)
