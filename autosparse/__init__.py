"""Learn from lottery tickets which weights matter; prune any timm model before training.

The names below are imported when they are first used, so that `import autosparse` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autosparse import criteria
    from autosparse.compaction import compact, densify
    from autosparse.corpus import Corpus
    from autosparse.optimizers import parameter_groups
    from autosparse.pruning import prune
    from autosparse.scorer import AutoS
    from autosparse.ticket import Ticket

_HOMES = {
    "AutoS": "scorer",
    "Corpus": "corpus",
    "Ticket": "ticket",
    "compact": "compaction",
    "densify": "compaction",
    "parameter_groups": "optimizers",
    "prune": "pruning",
}
__all__ = [
    "AutoS",
    "Corpus",
    "Ticket",
    "compact",
    "criteria",
    "densify",
    "parameter_groups",
    "prune",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"autosparse.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name in __all__:
        return import_module(f"autosparse.{name}")
    raise AttributeError(f"module 'autosparse' has no attribute {name!r}")
