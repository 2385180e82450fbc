"""Units: numbers for the positions along the dimensions of tensors, equal where they go together.

Position i of a layer's output, of the norm's gain behind it and of what the next layer reads is one
unit: it goes everywhere or nowhere. Unit 0 always stays. Where a dimension is seen as several
(channels as heads x width), a unit is bound to a tuple of others, and stays if all of these do.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

STAYS = 0
Positions: TypeAlias = "np.ndarray | None"
"""The units along a dimension, or None for one that is never made shorter."""
Dims: TypeAlias = "list[Positions]"
"""A tensor's dimensions."""


def padded(parts: Sequence[Sequence[int]], count: int) -> np.ndarray:
    """Return `count` rows that begin with the parts and are filled up with `STAYS`."""
    table = np.full((count, max(map(len, parts), default=0) or 1), STAYS)
    for row, each in zip(table, parts, strict=False):
        row[: len(each)] = each
    return table


class Units:
    """Which positions go together: union-find over numbers."""

    def __init__(self) -> None:
        self.parent: list[int] = [STAYS]
        self.bound: dict[int, tuple[int, ...]] = {}
        self.tuples: dict[tuple[int, ...], int] = {}

    def new(self, count: int) -> np.ndarray:
        """Return `count` new units."""
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def find(self, unit: int) -> int:
        """Return the unit that stands for all that go together with this one."""
        parent = self.parent
        while parent[unit] != unit:
            parent[unit] = parent[parent[unit]]
            unit = parent[unit]
        return unit

    def same(self, one: Positions, other: Positions) -> Positions:
        """Let two dimensions be made shorter alike; return their positions."""
        if one is None or other is None:
            self.keep(one)
            self.keep(other)
            return None
        if one is not other:
            for a, b in zip(one.tolist(), other.tolist(), strict=True):
                if a != b:
                    self._unite(a, b)
        return one

    def keep(self, positions: Positions) -> None:
        """Let all units of a dimension stay."""
        for unit in [] if positions is None else positions.tolist():
            self._keep(unit)

    def parts(self, unit: int) -> tuple[int, ...]:
        """Return the units that all have to stay if this one is to, without `STAYS`."""
        root = self.find(unit)
        if root == STAYS:
            return ()
        if root not in self.bound:
            return (root,)
        united = itertools.chain.from_iterable(self.parts(each) for each in self.bound[root])
        return tuple(dict.fromkeys(united))

    def merged(self, dims: Sequence[Positions], sizes: Sequence[int]) -> Positions:
        """Return the units of several dimensions that are seen as one, row-major."""
        if all(each is None for each in dims):
            return None
        grids = np.meshgrid(
            *(np.zeros(n, int) if d is None else d for d, n in zip(dims, sizes, strict=True)),
            indexing="ij",
        )
        tuples = []
        for each in zip(*(grid.reshape(-1).tolist() for grid in grids), strict=True):
            roots = tuple(self.find(unit) for unit in each)
            varying = tuple(root for root in roots if root != STAYS)
            tuples.append(self._tuple(varying))
        return np.array(tuples)

    def split(self, positions: Positions, sizes: Sequence[int]) -> Dims:
        """Return the units of a dimension that is seen as several of `sizes`, row-major."""
        if positions is None:
            return [None] * len(sizes)
        grid = np.array([self.find(unit) for unit in positions.tolist()]).reshape(sizes)
        dims: Dims = []
        for dim, size in enumerate(sizes):
            varies = size > 1 and bool((grid != grid.take([0], dim)).any())
            dims.append(self.new(size) if varies else None)
            grid = grid if varies else grid.take([0], dim)
        varying = [each for each in dims if each is not None]
        if len(varying) == 1:
            return [None if each is None else grid.reshape(-1) for each in dims]
        if not varying:
            self.keep(positions)
            return dims
        tuples = itertools.product(*(each.tolist() for each in varying))
        for unit, each in zip(grid.reshape(-1).tolist(), tuples, strict=True):
            self._bind(unit, each)
        return dims

    def _tuple(self, units: tuple[int, ...]) -> int:
        if len(units) <= 1:
            return units[0] if units else STAYS
        if units not in self.tuples:
            self.tuples[units] = int(self.new(1)[0])
            self.bound[self.tuples[units]] = units
        return self.tuples[units]

    def _bind(self, unit: int, parts: tuple[int, ...]) -> None:
        root = self.find(unit)
        if root == STAYS:
            for each in parts:
                self._keep(each)
        elif root not in self.bound:
            self.bound[root] = parts
        else:
            self._unite_tuples(root, self.bound[root], parts)

    def _unite_tuples(self, root: int, one: tuple[int, ...], other: tuple[int, ...]) -> None:
        if len(one) != len(other):
            self._keep(root)
            for each in other:
                self._keep(each)
            return
        for a, b in zip(one, other, strict=True):
            self._unite(a, b)

    def _unite(self, one: int, other: int) -> None:
        one, other = self.find(one), self.find(other)
        if one == other:
            return
        if STAYS in (one, other):
            self._keep(max(one, other))
            return
        if one not in self.bound:
            one, other = other, one
        if one in self.bound and (other in self.parts(one) or one in self.parts(other)):
            self._keep(one)  # A unit cannot be a part of itself.
            self._keep(other)
            return
        self.parent[other] = one
        if other in self.bound:
            self._unite_tuples(one, self.bound[one], self.bound.pop(other))

    def _keep(self, unit: int) -> None:
        root = self.find(unit)
        if root != STAYS:
            self.parent[root] = STAYS
            for each in self.bound.pop(root, ()):
                self._keep(each)
