"""Which units of a network go together, asked before anything is pruned.

A channel of a residual sum goes only if all layers that write it lose it; a head goes with its rows
of three projections and its columns of a fourth. What `slim` could cut is told here, weight by
weight, so that a criterion can choose among units instead of single weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import fx, nn

from autosparse.core.errors import UsageError
from autosparse.models.restore import untouched
from autosparse.models.zoo import device_of
from autosparse.sparsity.slim_constants import facts
from autosparse.sparsity.slim_graph import CONVOLUTIONS, argument, op_name, traced
from autosparse.sparsity.slim_moves import Moves
from autosparse.sparsity.slim_units import STAYS, Positions, Units, padded

Table: TypeAlias = np.ndarray
"""int [positions, parts]: a place along a dimension stays if all of its units do; rows are filled
up with `STAYS`."""


@dataclass(frozen=True)
class Coupled:
    """The units of a network, by number; unit 0 (`STAYS`) stays in any case."""

    tables: dict[str, tuple[Table, Table]]
    """Per weight [out, in, …]: the units of its outputs, and of its inputs."""
    kinds: list[np.ndarray]
    """Units that stand at the same dimensions of the same weights, and so compare: the channels
    of a residual stream, the heads of an attention, the hidden units of an MLP."""

    @property
    def count(self) -> int:
        """How many units there are that can go."""
        return sum(map(len, self.kinds))


def coupled(model: nn.Module, names: Iterable[str], shape: tuple[int, ...]) -> Coupled:
    """Return which units go together in a model whose weights `names` may lose weights.

    Args:
        model: dense; it is traced in eval mode and left as it was.
        names: the prunable weights [out, in, *kernel].
        shape: [C, H, W] of an image.

    Raises UsageError where the network cannot be traced.
    """
    names = list(names)
    dtype = next(model.parameters()).dtype
    images = torch.ones(2, *shape, device=device_of(model), dtype=dtype)
    try:
        with untouched(model):
            module = traced(model, images)
    except UsageError as error:
        raise UsageError(f"units: {error}; leave units out") from error
    rules = Moves(module, facts(module, images))
    _keep_what_others_write(module, rules, set(names))
    sizes = {name: model.get_parameter(name).shape[:2] for name in names}
    tables = {
        name: tuple(
            _table(rules.units, positions, size)
            for positions, size in zip(rules.tensors.get(name, [None] * 2), two, strict=False)
        )
        for name, two in sizes.items()
    }
    return _numbered(tables)  # type: ignore[arg-type]


def _keep_what_others_write(module: fx.GraphModule, rules: Moves, names: set[str]) -> None:
    """Let units stay that a layer writes which is not pruned: it goes on saying something."""
    for node in module.graph.nodes:
        if op_name(node) not in (*CONVOLUTIONS, "linear"):
            continue
        weight = str(node.args[1].target)
        depthwise = op_name(node) != "linear" and argument(node, "groups", 1) > 1
        if weight in rules.tensors and weight not in names and not depthwise:
            rules.units.keep(rules.tensors[weight][0])


def _table(units: Units, positions: Positions, size: int) -> Table:
    parts = [units.parts(unit) for unit in ([] if positions is None else positions.tolist())]
    return padded(parts, size)


def _numbered(tables: Mapping[str, tuple[Table, Table]]) -> Coupled:
    """Number the units from one on, kind by kind."""
    places: dict[int, dict[tuple[str, int, int], None]] = {}
    for name, pair in tables.items():
        for dim, table in enumerate(pair):
            for part, column in enumerate(table.T):
                for unit in dict.fromkeys(column.tolist()):
                    places.setdefault(unit, {})[name, dim, part] = None
    places.pop(STAYS, None)
    kinds: dict[tuple, list[int]] = {}
    for unit, where in places.items():
        kinds.setdefault(tuple(where), []).append(unit)
    numbers = np.zeros(max(places, default=0) + 1, dtype=int)
    numbered = []
    for units in kinds.values():
        first = 1 + sum(map(len, numbered))
        numbered.append(np.arange(first, first + len(units)))
        numbers[units] = numbered[-1]
    return Coupled({n: (numbers[one], numbers[two]) for n, (one, two) in tables.items()}, numbered)
