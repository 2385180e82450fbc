"""Tickets that leave units: a quota of units per layer, and single weights inside those that stay.

A dial from 0, where weights are chosen one by one, to 1, where the units that stay have just enough
room for the weights that are kept: structured pruning at the same number of weights. Between them
the density inside the units that stay is density ** (1 - units), 14 % for a ticket of 2 % at 0.5.

Which units: those with the highest sums of scores, as SNIP is made structured (J. van Amersfoort et
al. 2020, arXiv 2007.00389; S. Rachwan et al. 2022, arXiv 2206.10451), each layer's scores taken as
shares of their sum. How many: each layer shrinks its outputs and inputs by the same factor, set by
how dense the ticket at units 0 leaves it. Units shared by several layers shrink by the mean of what
those layers ask for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autosparse.core.errors import UsageError
from autosparse.sparsity import masks
from autosparse.sparsity.masks import Masks
from autosparse.sparsity.slim_groups import STAYS, Coupled


@dataclass(frozen=True)
class Dial:
    """Which units of a network can go, and how far that is asked for."""

    coupled: Coupled
    units: float
    """Above 0, at most 1."""

    def check(self) -> None:
        """Raise UsageError for a network none of whose units can go."""
        if not any(self.can_shrink(name) for name in self.coupled.tables):
            raise UsageError("units: no unit of this network can go, so leave units out")

    def can_shrink(self, name: str) -> bool:
        """Return whether a weight lies in a unit that can go."""
        return any((table != STAYS).any() for table in self.coupled.tables[name])


@dataclass(frozen=True)
class Rooms:
    """Where weights may be: inside the units that stay."""

    within: Masks
    """Per weight a bool tensor of its shape."""
    counts: dict[str, int]
    """How many weights each layer keeps."""
    left: int
    """How many units stay."""
    of: int
    """How many units there are that could go."""


def rooms(
    dial: Dial,
    scores: Mapping[str, Tensor],
    chosen: Masks,
    *,
    min_per_layer: int = 1,
    per_channel: bool = False,
) -> Rooms:
    """Choose units; return where the weights may be and how many each layer keeps.

    With more of `dial.units` fewer stay, all of them among those that stay with less. Every kind of
    unit keeps one. Layers keep as many weights as in `chosen`; what finds no room there goes to
    the other layers that have units, in proportion, and none to layers that have no units.

    Args:
        dial: what can go in the network, and how much of that should.
        scores: per weight a float tensor; higher = keep. Equal units stay in their order.
        chosen: the masks at units 0.
        min_per_layer: how many weights a layer keeps at least.
        per_channel: whether every output channel that stays keeps one.
    """
    coupled = dial.coupled
    kept = {name: int(mask.count_nonzero()) for name, mask in chosen.items()}
    order = _order(coupled, _sums(coupled, scores, kept), _shrink(coupled, chosen, kept))
    ranks = np.full(1 + coupled.count, len(order))
    ranks[order] = np.arange(len(order))
    ends = {
        name: tuple(ranks[table].min(1) for table in pair) for name, pair in coupled.tables.items()
    }
    dial.check()
    free = [name for name in chosen if dial.can_shrink(name)]
    sizes = {name: chosen[name].numel() for name in free}
    gone = _how_many(ends, sizes, kept, dial.units, len(order))
    within = {}
    for name, mask in chosen.items():
        out, into = (torch.from_numpy(end >= gone).to(mask.device) for end in ends[name])
        shape = (len(out), len(into), *[1] * (mask.dim() - 2))
        within[name] = (out[:, None] & into[None]).view(shape).expand(mask.shape).contiguous()
    least = masks.least_of(scores, min_per_layer, per_channel, within)
    counts = kept | masks.allocate(
        {name: kept[name] for name in free},
        dict.fromkeys(free, 1),
        sum(kept[name] for name in free),
        {name: least[name] for name in free},
        most={name: int(within[name].count_nonzero()) for name in free},
    )
    return Rooms(within, counts, coupled.count - gone, coupled.count)


def _sums(coupled: Coupled, scores: Mapping[str, Tensor], kept: Mapping[str, int]) -> np.ndarray:
    """Return per unit the sum of scores, each layer's as shares of the weights that it keeps."""
    per_unit = np.zeros(1 + coupled.count)
    for name, tables in coupled.tables.items():
        score = scores[name].detach()
        score = score.reshape(*score.shape[:2], -1)
        lowest, size = float(score.min()), score.numel()
        whole = float(score.sum(dtype=torch.float64)) - lowest * size
        for dim, table in enumerate(tables):
            each = size // len(table)
            sums = score.sum((1 - dim, 2), dtype=torch.float64).cpu().numpy() - lowest * each
            share = sums / whole if whole > 0 else np.full(len(table), each / size)
            for column in table.T:
                np.add.at(per_unit, column, kept[name] * share)
    return per_unit


def _shrink(coupled: Coupled, chosen: Masks, kept: Mapping[str, int]) -> list[float]:
    """Return per kind how fast it shrinks: the log of the factor, at least 0."""
    asked, weight = np.zeros(len(coupled.kinds)), np.zeros(len(coupled.kinds))
    kind_of = np.full(1 + coupled.count, -1)
    for number, kind in enumerate(coupled.kinds):
        kind_of[kind] = number
    for name, tables in coupled.tables.items():
        shares = np.zeros(len(coupled.kinds))
        for table in tables:
            for column in table.T:
                there = kind_of[column[column != STAYS]]
                shares += np.bincount(there, minlength=len(shares)) / len(table)
        if not shares.any():
            continue
        size, few = chosen[name].numel(), max(kept[name], 1)
        asked += shares * few * math.log(size / few) / shares.sum()
        weight += shares * few
    return (asked / np.maximum(weight, np.finfo(float).tiny)).tolist()


def _order(coupled: Coupled, sums: np.ndarray, shrink: list[float]) -> np.ndarray:
    """Return the units in the order in which they go; the best one of each kind is not among them.

    At time t a kind of N units has N * exp(-shrink * t) of them, rounded.
    """
    going: list[tuple[float, int, int]] = []
    for number, (kind, speed) in enumerate(zip(coupled.kinds, shrink, strict=True)):
        if speed <= 0:
            continue
        best_first = kind[np.argsort(-sums[kind], kind="stable")].tolist()
        for left in range(len(kind) - 1, 0, -1):
            time = math.log(len(kind) / (left + 0.5)) / speed
            going.append((time, number, best_first[left]))
    return np.array([unit for _, _, unit in sorted(going, key=lambda each: each[:2])], dtype=int)


def _how_many(
    ends: Mapping[str, tuple[np.ndarray, ...]],
    sizes: Mapping[str, int],
    kept: Mapping[str, int],
    units: float,
    most: int,
) -> int:
    """Return how many units go: as many as leave room for what the dial says."""
    count, size = sum(kept[name] for name in sizes), sum(sizes.values())
    if not count or count == size:
        return 0
    wanted = max(count, math.exp((1 - units) * math.log(size) + units * math.log(count)))
    wanted = count if units == 1 else wanted

    def room(gone: int) -> int:
        weights = 0
        for name, each in sizes.items():
            out, into = ends[name]
            kernel = each // (len(out) * len(into))
            weights += int((out >= gone).sum()) * int((into >= gone).sum()) * kernel
        return weights

    low, high = 0, most  # Room for `low` gone is enough; the answer is at most `high`.
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if room(middle) >= wanted else (low, middle - 1)
    return low
