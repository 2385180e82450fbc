"""Operators that move elements: views, transposes, parts and joins, and how units go with them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import fx

from autosparse.sparsity.slim_graph import argument, dimension, op_name
from autosparse.sparsity.slim_rules import Rules
from autosparse.sparsity.slim_units import STAYS, Dims, Positions


class Moves(Rules):
    """Operators that move elements, and whose arguments name sizes."""

    def _view(self, node: fx.Node) -> Dims:
        source = node.args[0]
        before, after = self._shape(source), self._shape(node)
        dims = self.dims[source]  # type: ignore[index]
        labels_after: Dims = [None] * len(after)
        for old, new in _groups(before, after):
            sizes = [before[each] for each in old]
            labels = [dims[each] for each in old]
            whole = labels[0] if len(labels) == 1 else self.units.merged(labels, sizes)
            parts = (
                [whole] if len(new) == 1 else self.units.split(whole, [after[each] for each in new])
            )
            for place, positions in zip(new, parts, strict=True):
                labels_after[place] = positions
        known = op_name(node) in ("flatten", "reshape_as", "view_as")
        return labels_after if known else self._sizes_known(node, labels_after)

    _reshape = _unsafe_view = _flatten = _unflatten = _view

    def _reshape_as(self, node: fx.Node) -> Dims:
        """Like a view whose sizes are those of another tensor."""
        viewed, other = self._view(node), self.dims[node.args[1]]  # type: ignore[index]
        return [self.units.same(a, b) for a, b in zip(viewed, other, strict=True)]

    _view_as = _reshape_as

    def _sizes_known(self, node: fx.Node, dims: Dims) -> Dims:
        """Keep what a size that is computed in the graph speaks of."""
        wanted = None if op_name(node) == "unflatten" else node.args[1]
        for place, positions in enumerate(dims):
            known = isinstance(wanted, list | tuple) and isinstance(wanted[place], int)
            if positions is not None and not known:
                self._keep(positions, node)
                dims[place] = None
        return dims

    def _expand(self, node: fx.Node) -> Dims:
        source = node.args[0]
        before, after = self._shape(source), self._shape(node)
        dims = [*[None] * (len(after) - len(before)), *self.dims[source]]  # type: ignore[index]
        padded = [*[1] * (len(after) - len(before)), *before]
        labels: Dims = [d if a == b else None for d, a, b in zip(dims, padded, after, strict=True)]
        sizes = node.args[1]
        for place, positions in enumerate(labels):
            if positions is not None and not isinstance(sizes[place], int):  # type: ignore
                self._keep(positions, node)
                labels[place] = None
        return labels

    def _permute(self, node: fx.Node) -> Dims:
        dims = self.dims[node.args[0]]  # type: ignore[index]
        return [dims[each] for each in argument(node, "dims")]

    def _transpose(self, node: fx.Node) -> Dims:
        dims = list(self.dims[node.args[0]])  # type: ignore[index]
        one, other = argument(node, "dim0"), argument(node, "dim1")
        dims[one], dims[other] = dims[other], dims[one]
        return dims

    def _t(self, node: fx.Node) -> Dims:
        return list(reversed(self.dims[node.args[0]]))  # type: ignore[index]

    def _unsqueeze(self, node: fx.Node) -> Dims:
        dims = list(self.dims[node.args[0]])  # type: ignore[index]
        dims.insert(dimension(argument(node, "dim"), len(dims) + 1), None)
        return dims

    def _squeeze(self, node: fx.Node) -> Dims:
        source = node.args[0]
        before, after = self._shape(source), self._shape(node)
        left = [d for d, n in zip(self.dims[source], before, strict=True) if n > 1]  # type: ignore
        if len(node.args) < 2:
            return left
        over = node.args[1]
        over = {dimension(e, len(before)) for e in ([over] if isinstance(over, int) else over)}  # type: ignore
        left = [
            d
            for i, (d, n) in enumerate(zip(self.dims[source], before, strict=True))  # type: ignore
            if not (i in over and n == 1)
        ]
        assert len(left) == len(after)
        return left

    def _getitem(self, node: fx.Node) -> Any:
        return self.dims[node.args[0]][node.args[1]]  # type: ignore[index]

    def _cat(self, node: fx.Node) -> Dims:
        inputs = [each for each in node.args[0] if len(self._shape(each)) > 1]  # type: ignore
        if len(inputs) != len(node.args[0]):  # type: ignore[arg-type]
            return self._unknown(node)
        along = dimension(argument(node, "dim", 0), len(self._shape(node)))
        labels: Dims = []
        for place in range(len(self._shape(node))):
            there = [self.dims[each][place] for each in inputs]
            if place == along:
                labels.append(self._joined(there, [self._shape(each)[place] for each in inputs]))
                continue
            positions = there[0]
            for other in there[1:]:
                positions = self.units.same(positions, other)
            if positions is None:
                for other in there:
                    self._keep(other, node)
            labels.append(positions)
        return labels

    def _joined(self, there: Dims, sizes: list[int]) -> Positions:
        if all(each is None for each in there):
            return None
        filled = [
            np.full(n, STAYS) if each is None else each
            for each, n in zip(there, sizes, strict=True)
        ]
        return np.concatenate(filled)

    def _slice(self, node: fx.Node) -> Dims:
        dims = list(self.dims[node.args[0]])  # type: ignore[index]
        dim = dimension(argument(node, "dim", 0), len(dims))
        if dims[dim] is not None:
            if argument(node, "step", 1) != 1 or len(node.all_input_nodes) > 1:
                self._keep(dims[dim], node)
                dims[dim] = None
            else:
                start, end = argument(node, "start", None), argument(node, "end", None)
                dims[dim] = dims[dim][slice(start, end)]
        return dims

    def _split_with_sizes(self, node: fx.Node) -> Any:
        source = node.args[0]
        dims = self.dims[source]  # type: ignore[index]
        dim = dimension(argument(node, "dim", 0), len(dims))
        parts, start = [], 0
        for shape in self.facts.shapes[node]:
            part = list(dims)
            if dims[dim] is not None:
                part[dim] = dims[dim][start : start + shape[dim]]
            start += shape[dim]
            parts.append(part)
        return parts

    _split = _chunk = _split_with_sizes

    def _unbind(self, node: fx.Node) -> Any:
        dims = list(self.dims[node.args[0]])  # type: ignore[index]
        dim = dimension(argument(node, "dim", 0), len(dims))
        self._keep(dims.pop(dim), node)
        return [list(dims) for _ in self.facts.shapes[node]]

    def _select(self, node: fx.Node) -> Dims:
        dims = list(self.dims[node.args[0]])  # type: ignore[index]
        self._keep(dims.pop(dimension(argument(node, "dim"), len(dims))), node)
        return dims

    def _stack(self, node: fx.Node) -> Dims:
        inputs = list(node.args[0])  # type: ignore[arg-type]
        dims = self._pointwise(inputs[0], inputs)
        dims.insert(dimension(argument(node, "dim", 0), len(dims) + 1), None)
        return dims

    def _roll(self, node: fx.Node) -> Dims:
        dims = list(self.dims[node.args[0]])  # type: ignore[index]
        for each in argument(node, "dims") or range(len(dims)):
            self._keep(dims[each], node)
            dims[each] = None
        return dims

    _flip = _roll

    def _constant_pad_nd(self, node: fx.Node) -> Dims:
        dims = list(self.dims[node.args[0]])  # type: ignore[index]
        padding = argument(node, "pad")
        for back in range(len(padding) // 2):
            if padding[2 * back] or padding[2 * back + 1]:
                self._keep(dims[-1 - back], node)
                dims[-1 - back] = None
        return dims

    _pad = _constant_pad_nd

    def _index_select(self, node: fx.Node) -> Dims:
        dims = list(self.dims[node.args[0]])  # type: ignore[index]
        dim = dimension(argument(node, "dim"), len(dims))
        self._keep(dims[dim], node)
        self._keep_places(argument(node, "index"), node)
        dims[dim] = None
        return dims

    def _index(self, node: fx.Node) -> Dims:
        dims, indices = self.dims[node.args[0]], list(node.args[1])  # type: ignore
        places = [place for place, each in enumerate(indices) if each is not None]
        if len(places) != 1:
            return self._unknown(node)
        index = indices[places[0]]
        count = len(self._shape(index))
        if len(self._shape(node)) != len(dims) - 1 + count:
            return self._unknown(node)  # A mask of several dimensions.
        self._keep(dims[places[0]], node)
        self._keep_places(index, node)
        return [*dims[: places[0]], *[None] * count, *dims[places[0] + 1 :]]

    def _keep_places(self, index: fx.Node, node: fx.Node) -> None:
        """Let a list of places stay whole: what is picked by it gets its size."""
        for positions in self.dims[index]:
            self._keep(positions, node)


def _groups(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Return which dimensions of one shape are which of another; those of size one left out."""
    old = [place for place, n in enumerate(before) if n != 1]
    new = [place for place, n in enumerate(after) if n != 1]
    pairs = []
    while old or new:
        left, right = [old.pop(0)], [new.pop(0)]
        while True:
            one = math.prod(before[each] for each in left)
            other = math.prod(after[each] for each in right)
            if one == other:
                break
            if one < other:
                left.append(old.pop(0))
            else:
                right.append(new.pop(0))
        pairs.append((left, right))
    return pairs
