"""How operators carry units along: which positions of what they read and give go together.

An operator without a rule keeps all that it reads as it is: size is lost, never exactness.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from autosparse.sparsity.slim_constants import CASTS, Facts
from autosparse.sparsity.slim_graph import (
    CONVOLUTIONS,
    argument,
    dimension,
    is_pointwise,
    op_name,
    tensor_at,
)
from autosparse.sparsity.slim_units import Dims, Positions, Units

SAME = {"clone", "contiguous", "alias", "detach", "dropout", "feature_dropout", *CASTS}
PER_CHANNEL = {
    "max_pool2d", "avg_pool2d", "avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool1d",
    "adaptive_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
}  # fmt: skip
"""They mix places, never channels [batch, channels, …]."""


@dataclass
class Site:
    """Where channels are added up: a convolution, a linear layer or a product of signals."""

    node: fx.Node
    reads: np.ndarray
    """Units of the dimension that is added up."""
    gives: Positions
    """Units of the weight's rows."""
    used: np.ndarray | None
    """bool [groups, rows, channels]: the weight is not zero; None where both factors move."""
    can_go: np.ndarray
    """bool, like `reads`: a channel without which the sum is known: it is a constant."""

    def needed(self, rows_stay: np.ndarray) -> np.ndarray:
        """Return bool, like `reads`: which channels some row that stays listens to."""
        if self.used is None:
            return np.ones(len(self.reads), dtype=bool)
        groups, rows, _ = self.used.shape
        return (self.used & rows_stay.reshape(groups, rows, 1)).any(1).reshape(-1)


class Rules:
    """The units of every tensor of a graph, found from input to output."""

    def __init__(self, module: fx.GraphModule, facts: Facts) -> None:
        self.module, self.facts = module, facts
        self.units = Units()
        self.dims: dict[fx.Node, Any] = {}
        self.sites: list[Site] = []
        self.kept_whole: Counter[str] = Counter()
        """Per operator, how many dimensions it kept as they are."""
        self.tensors: dict[str, Dims] = {}
        for node in module.graph.nodes:
            self._follow(node)

    def _follow(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            name = str(node.target)
            shape = tensor_at(self.module, name).shape
            if name not in self.tensors:
                self.tensors[name] = [self.units.new(n) if n > 1 else None for n in shape]
            self.dims[node] = self.tensors[name]
        elif node.op == "output":
            for positions in (p for each in node.all_input_nodes for p in _flat(self.dims[each])):
                self.units.keep(positions)
        elif op_name(node) == "sym_size":
            self._keep(self.dims[node.args[0]][node.args[1]], node)  # type: ignore[index]
        elif self.facts.shapes.get(node) is None:
            self._keep_inputs(node)
        elif node.op == "placeholder":
            self.dims[node] = [None] * len(self.facts.shapes[node])
        else:
            self.dims[node] = self._of_call(node)

    def _of_call(self, node: fx.Node) -> Any:
        name = op_name(node)
        rule = getattr(self, f"_{name.lstrip('_')}", None)
        if rule is not None:
            return rule(node)
        if name in CONVOLUTIONS:
            return self._convolution(node)
        if name in SAME:
            return list(self.dims[node.args[0]])  # type: ignore[index]
        if name in PER_CHANNEL:
            return self._per_channel(node)
        if is_pointwise(node):
            return self._pointwise(node, [n for n in node.all_input_nodes if n in self.dims])
        return self._unknown(node)

    def _unknown(self, node: fx.Node) -> Any:
        self._keep_inputs(node)
        shape = self.facts.shapes[node]
        if isinstance(shape, list):
            return [None if each is None else [None] * len(each) for each in shape]
        return [None] * len(shape)

    def _keep_inputs(self, node: fx.Node) -> None:
        for each in node.all_input_nodes:
            dims = self.dims.get(each)
            for positions in _flat(dims):
                self._keep(positions, node)

    def _keep(self, positions: Positions, node: fx.Node) -> None:
        if positions is not None:
            self.kept_whole[op_name(node)] += 1
            self.units.keep(positions)

    def _shape(self, node: Any) -> tuple[int, ...]:
        return self.facts.shapes[node]

    def _pointwise(self, node: fx.Node, inputs: list[fx.Node]) -> Dims:
        shape = self._shape(node)
        labels: Dims = []
        for back in range(len(shape), 0, -1):
            there = [
                self.dims[each][-back]
                for each in inputs
                if len(self._shape(each)) >= back and self._shape(each)[-back] == shape[-back] > 1
            ]
            positions = there[0] if there else None
            for other in there[1:]:
                positions = self.units.same(positions, other)
            if positions is None:
                for other in there:
                    self._keep(other, node)
            labels.append(positions)
        return labels

    def _per_channel(self, node: fx.Node) -> Any:
        dims = self.dims[node.args[0]]  # type: ignore[index]
        channel = 1 if len(dims) > 2 else 0
        for place, positions in enumerate(dims):
            if place > channel:
                self._keep(positions, node)
        shape: Any = self._shape(node)
        if isinstance(shape, list):  # A maximum, and its place.
            return [[*dims[: channel + 1], *[None] * (len(s) - channel - 1)] for s in shape]
        return [*dims[: channel + 1], *[None] * (len(shape) - channel - 1)]

    def _prelu(self, node: fx.Node) -> Dims:
        dims, (weight,) = list(self.dims[node.args[0]]), self.dims[node.args[1]]  # type: ignore
        if weight is not None:
            dims[1] = self.units.same(dims[1], weight)
        return dims

    def _batch_norm(self, node: fx.Node) -> Dims:
        dims = list(self.dims[node.args[0]])  # type: ignore[index]
        for each in node.args[1:5]:
            if isinstance(each, fx.Node):
                dims[1] = self.units.same(dims[1], self.dims[each][0])
        return dims

    def _native_batch_norm_legit_no_training(self, node: fx.Node) -> Any:
        dims = self._batch_norm(node)
        return [dims, [None], [None]]

    def _layer_norm(self, node: fx.Node) -> Dims:
        """Channels depend on each other here, dead ones too: all stay."""
        count = len(argument(node, "normalized_shape"))
        for each in node.all_input_nodes:
            for positions in self.dims[each][-count:]:
                self._keep(positions, node)
        dims = self.dims[node.args[0]]  # type: ignore[index]
        return [*dims[:-count], *[None] * count]

    _rms_norm = _layer_norm

    def _softmax(self, node: fx.Node) -> Dims:
        dims = list(self.dims[node.args[0]])  # type: ignore[index]
        dim = dimension(argument(node, "dim"), len(dims))
        self._keep(dims[dim], node)
        dims[dim] = None
        return dims

    _log_softmax = _softmax
    _cumsum = _softmax

    def _mean(self, node: fx.Node) -> Dims:
        dims = list(self.dims[node.args[0]])  # type: ignore[index]
        over = argument(node, "dim") if len(node.args) > 1 or "dim" in node.kwargs else None
        over = range(len(dims)) if over in (None, []) else over
        over = {dimension(each, len(dims)) for each in ([over] if isinstance(over, int) else over)}
        for each in over:
            self._keep(dims[each], node)
            dims[each] = None
        shape = self._shape(node)
        return dims if len(shape) == len(dims) else [d for i, d in enumerate(dims) if i not in over]

    _sum = _mean
    _amax = _mean

    def _convolution(self, node: fx.Node) -> Dims:
        signal, weight, bias = node.args[0], node.args[1], argument(node, "bias")
        groups = argument(node, "groups", 1)
        read, rows = self.dims[signal], self.dims[weight]  # type: ignore[index]
        if len(read) < len(rows) or weight.op != "get_attr":  # type: ignore[union-attr]
            return self._unknown(node)
        for positions in read[2:]:
            self._keep(positions, node)
        for positions in rows[2:]:
            self.units.keep(positions)  # Places of a kernel.
        channels, gives = self._shape(signal)[1], rows[0]
        if groups == channels > 1:
            each = self._shape(weight)[0] // channels
            reads = None if read[1] is None else np.repeat(read[1], each)
            self._keep(gives if reads is None else None, node)
            gives = None if reads is None else self.units.same(reads, gives)
        else:
            gives = self._adds_up(node, read[1], gives, rows[1], groups)
        if isinstance(bias, fx.Node):
            gives = self.units.same(gives, self.dims[bias][0])
        return [read[0], gives, *[None] * (len(rows) - 2)]

    def _adds_up(
        self, node: fx.Node, read: Positions, gives: Positions, columns: Positions, groups: int
    ) -> Positions:
        """Note a site; return the units that it gives."""
        weight_node = node.args[1]
        shape = self._shape(weight_node)
        if groups > 1:
            number, each = self.units.new(groups), shape[0] // groups
            wanted = self.units.merged([number, columns], [groups, shape[1]])
            row = self.units.new(each) if each > 1 else None
            gives = self.units.same(gives, self.units.merged([number, row], [groups, each]))
        else:
            wanted = columns
        reads = self.units.same(read, wanted)
        if reads is None:
            return gives
        inputs = self.facts.constant_inputs[node]
        used = tensor_at(self.module, str(weight_node.target)).detach() != 0  # type: ignore[union-attr]
        used = used.reshape(groups, shape[0] // groups, shape[1], -1).any(-1)
        self.sites.append(
            Site(node, reads, gives, used.cpu().numpy(), inputs.constant.cpu().numpy())
        )
        return gives

    def _linear(self, node: fx.Node) -> Dims:
        signal, weight, bias = node.args[0], node.args[1], argument(node, "bias")
        if weight.op != "get_attr" or node not in self.facts.constant_inputs:  # type: ignore[union-attr]
            return self._unknown(node)
        read, rows = self.dims[signal], self.dims[weight]  # type: ignore[index]
        gives = self._adds_up(node, read[-1], rows[0], rows[1], 1)
        if isinstance(bias, fx.Node):
            gives = self.units.same(gives, self.dims[bias][0])
        return [*read[:-1], gives]

    def _matmul(self, node: fx.Node) -> Dims:
        first, second = node.args[:2]
        if node not in self.facts.zero_products:
            return self._unknown(node)
        one, other = self.dims[first], self.dims[second]  # type: ignore[index]
        self._product(node, one[-1], other[-2])
        lead = self._leading(node, [(first, one[:-2]), (second, other[:-2])])
        return [*lead, one[-2], other[-1]]

    _bmm = _matmul

    def _product(self, node: fx.Node, one: Positions, other: Positions) -> None:
        reads = self.units.same(one, other)
        if reads is not None:
            zero = self.facts.zero_products[node].cpu().numpy()
            self.sites.append(Site(node, reads, None, None, zero))

    def _leading(self, node: fx.Node, inputs: list[tuple[Any, Dims]]) -> Dims:
        count = len(self._shape(node)) - 2
        labels: Dims = []
        for back in range(count, 0, -1):
            there = [
                dims[-back]
                for each, dims in inputs
                if len(dims) >= back and self._shape(each)[: len(dims)][-back] > 1
            ]
            positions = there[0] if there else None
            for other in there[1:]:
                positions = self.units.same(positions, other)
            labels.append(positions)
        return labels

    def _scaled_dot_product_attention(self, node: fx.Node) -> Dims:
        query, key, value = node.args[:3]
        mask = argument(node, "attn_mask")
        shapes = {self._shape(each)[:-2] for each in (query, key, value)}
        if len(shapes) > 1:
            return self._unknown(node)
        q, k, v = (self.dims[each] for each in (query, key, value))  # type: ignore[index]
        self._product(node, q[-1], k[-1])
        for positions in (q[-2], k[-2], v[-2]):
            self._keep(positions, node)
        inputs = [(query, q[:-2]), (key, k[:-2]), (value, v[:-2])]
        if isinstance(mask, fx.Node):
            inputs.append((mask, self.dims[mask][:-2]))
            for positions in self.dims[mask][-2:]:
                self._keep(positions, node)
        return [*self._leading(node, inputs), None, v[-1]]


def _flat(dims: Any) -> list[Positions]:
    """Return all dimensions of a tensor, or of several tensors."""
    if dims is None:
        return []
    return [p for each in dims for p in (_flat(each) if isinstance(each, list) else [each])]
