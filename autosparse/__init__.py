"""Learn from lottery tickets which weights matter; prune any timm model before training.

The names below are imported when they are first used, so that `import autosparse` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autosparse import criteria
    from autosparse.autos.network import AutoS
    from autosparse.corpus.store import Corpus
    from autosparse.criteria.pruning import prune
    from autosparse.sparsity.compact import densify
    from autosparse.sparsity.slim import slim
    from autosparse.sparsity.slim_training import slim_for_training
    from autosparse.sparsity.ticket import Ticket, compact
    from autosparse.training.optimizers import parameter_groups

_HOMES = {
    "AutoS": "autos.network",
    "Corpus": "corpus.store",
    "Ticket": "sparsity.ticket",
    "compact": "sparsity.ticket",
    "densify": "sparsity.compact",
    "parameter_groups": "training.optimizers",
    "prune": "criteria.pruning",
    "slim": "sparsity.slim",
    "slim_for_training": "sparsity.slim_training",
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
    "slim",
    "slim_for_training",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"autosparse.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name in __all__:
        return import_module(f"autosparse.{name}")
    raise AttributeError(f"module 'autosparse' has no attribute {name!r}")
