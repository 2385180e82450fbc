"""What a network computes whatever the image is: constants, element by element.

The graph is computed once in float64. For each tensor a bool tensor of the same shape records which
elements depend on the image. An element that does not is a constant, and its value is known.
Nothing is guessed: behind an operator without a rule everything depends on the image that could.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from autosparse.sparsity.slim_graph import (
    CONVOLUTIONS,
    argument,
    dimension,
    is_pointwise,
    op_name,
    tensor_at,
    unbiased,
)

MOVES = {
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "permute", "transpose", "t",
    "movedim", "unsqueeze", "squeeze", "expand", "cat", "stack", "slice", "split",
    "split_with_sizes", "chunk", "unbind", "select", "getitem", "clone", "contiguous", "roll",
    "flip", "repeat", "alias", "detach", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    "im2col", "unfold", "narrow", "index", "index_select", "dropout", "lift_fresh_copy",
    "tile", "rot90", "view_as", "reshape_as", "expand_as", "feature_dropout", "alpha_dropout",
}  # fmt: skip
"""They only move elements, so what depends on the image moves alike."""
POOLS = {
    "max_pool2d", "avg_pool2d", "avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool1d",
    "adaptive_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "mean", "sum", "amax",
}  # fmt: skip
"""Weighted with what is never negative: an output depends if one of its inputs does."""
CASTS = {"to", "_to_copy", "type_as"}
CLOSE = 1e-12
"""Two float64 values are one constant if they differ by less, relative to the largest."""


@dataclass
class ConstantInputs:
    """What a convolution or linear layer reads, along the dimension that it sums over."""

    constant: Tensor
    """bool [channels]: at no place does the channel depend on the image."""
    zero: Tensor
    """bool [channels]: constant, and zero everywhere."""
    values: Tensor
    """float64 [1, …]: the input with zeros in channels that are not constant."""


@dataclass
class Facts:
    """What is known of a graph after it was computed once."""

    shapes: dict[fx.Node, Any] = field(default_factory=dict)
    """Shape of every tensor (a list of them where an operator gives several)."""
    constants: dict[fx.Node, Tensor] = field(default_factory=dict)
    """Tensors that do not depend on the image at all."""
    output: Any = None
    """What the graph gives for the images, in float64."""
    constant_inputs: dict[fx.Node, ConstantInputs] = field(default_factory=dict)
    zero_products: dict[fx.Node, Tensor] = field(default_factory=dict)
    """Per product of two signals, bool [summed]: what is not missed: one of both factors is zero
    there, or in attention all keys are alike."""


@torch.no_grad()
def facts(module: fx.GraphModule, images: Tensor) -> Facts:
    """Compute the graph for `images` [2, C, H, W] and tell what is constant."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # For tensors that the graph itself makes.
    try:
        return _facts(module, images)
    finally:
        torch.set_default_dtype(default)


def _facts(module: fx.GraphModule, images: Tensor) -> Facts:
    known, run = Facts(), _Run()
    last = _last_uses(module.graph)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            value = images.double()
            run.values[node], run.depends[node] = value, torch.ones_like(value, dtype=torch.bool)
        elif node.op == "get_attr":
            value = tensor_at(module, str(node.target)).detach()
            run.values[node] = value.double() if value.is_floating_point() else value
        elif node.op == "call_function":
            run.compute(node)
            _note(known, run, node)
        elif node.op == "output":
            known.output = fx.node.map_arg(node.args[0], run.values.__getitem__)
        if node in run.values:
            known.shapes[node] = _shapes(run.values[node])
        for gone in last.get(node, ()):
            run.values.pop(gone, None)
            run.depends.pop(gone, None)
    return known


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    last = {}
    for node in graph.nodes:
        for each in (node, *node.all_input_nodes):
            last[each] = node
    uses: dict[fx.Node, list[fx.Node]] = {}
    for each, node in last.items():
        uses.setdefault(node, []).append(each)
    return uses


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return [_shapes(each) for each in value] if isinstance(value, list | tuple) else None


def _note(known: Facts, run: _Run, node: fx.Node) -> None:
    value, name = run.values[node], op_name(node)
    args: Any = node.args
    if isinstance(value, Tensor) and run.depends.get(node) is None:
        known.constants[node] = value
    if (name in CONVOLUTIONS or name == "linear") and len(known.shapes[args[0]]) > 1:
        dim = 1 if name in CONVOLUTIONS else -1
        known.constant_inputs[node] = _constant_inputs(run, args[0], dim)
    elif name in ("matmul", "bmm"):
        first, second = args[:2]
        if len(known.shapes[first]) > 1 and len(known.shapes[second]) > 1:
            known.zero_products[node] = run.zeros(first, -1) | run.zeros(second, -2)
            if _into_softmax(node, value.dim()):
                known.zero_products[node] |= run.alike(second, -2, -1)
    elif name == "scaled_dot_product_attention":
        known.zero_products[node] = (
            run.zeros(args[0], -1) | run.zeros(args[1], -1) | run.alike(args[1], -1, -2)
        )


def _into_softmax(node: fx.Node, count: int) -> bool:
    """Does a product of `count` dimensions go into softmaxes over its last one only?

    On the way it may be scaled by a number, and something may be added.
    """

    def ends(user: fx.Node) -> bool:
        name = op_name(user)
        if name in ("softmax", "_softmax"):
            return argument(user, "dim") in (-1, count - 1)
        scaled = name in ("mul", "div") and len(user.all_input_nodes) == 1
        return (scaled or name == "add") and _into_softmax(user, count)

    return bool(node.users) and all(map(ends, node.users))


def _constant_inputs(run: _Run, node: Any, dim: int) -> ConstantInputs:
    value, depends = run.values[node].movedim(dim, 1), run.depends.get(node)
    spread = value.amax(0) - value.amin(0)
    alike = spread <= CLOSE * value.abs().amax().clamp(min=1)
    constant = alike.reshape(len(alike), -1).all(1)
    if depends is not None:
        constant = constant & ~depends.movedim(dim, 0).flatten(1).any(1)
    zero = constant & (value == 0).transpose(0, 1).flatten(1).all(1)
    values = value[:1] * constant.view(1, -1, *[1] * (value.dim() - 2))
    return ConstantInputs(constant, zero, values.movedim(1, dim))


class _Run:
    """Values so far, and which of their elements depend on the image (absent: none does)."""

    def __init__(self) -> None:
        self.values: dict[fx.Node, Any] = {}
        self.depends: dict[fx.Node, Any] = {}
        self.shares: set[fx.Node] = set()
        """Softmax over the last dimension: rows that sum to one."""

    def compute(self, node: fx.Node) -> None:
        """Compute a node's value and which of its elements depend on the image."""
        value = self._call(node, self.values.__getitem__)
        self.values[node] = value
        inputs = [each for each in node.all_input_nodes if self.depends.get(each) is not None]
        if not inputs or not _has_floats(value):
            return
        depends = self._depends(node, value)
        if isinstance(depends, Tensor):
            depends = None if not depends.any() else depends.expand(value.shape)
        self.depends[node] = depends

    def zeros(self, node: fx.Node, dim: int) -> Tensor:
        """Return bool [size of `dim`]: constant zero at every other place."""
        value, depends = self.values[node], self.depends.get(node)
        quiet = value == 0 if depends is None else (value == 0) & ~depends
        return quiet.movedim(dim, 0).flatten(1).all(1)

    def alike(self, node: fx.Node, dim: int, keys: int) -> Tensor:
        """Return bool [size of `dim`]: constant, and alike for all keys: a softmax ignores it."""
        value, depends = self.values[node], self.depends.get(node)
        alike = value == value.narrow(keys, 0, 1)
        quiet = alike if depends is None else alike & ~depends
        return quiet.movedim(dim, 0).flatten(1).all(1)

    def _call(self, node: fx.Node, of: Any) -> Any:
        args = fx.node.map_arg(node.args, of)
        kwargs = fx.node.map_arg(node.kwargs, of)
        args = tuple(torch.float64 if _is_float(each) else each for each in args)
        kwargs = {k: torch.float64 if _is_float(v) else v for k, v in kwargs.items()}
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _of(self, node: fx.Node) -> Any:
        """Return 1.0 where an element depends on the image, else 0.0; others as they are."""
        depends, value = self.depends.get(node), self.values[node]
        if isinstance(depends, list):
            return [
                torch.zeros_like(v, dtype=torch.float32) if h is None else h.float()
                for h, v in zip(depends, value, strict=True)
            ]
        if depends is not None:
            return depends.float()
        if isinstance(value, Tensor) and value.is_floating_point():
            return torch.zeros_like(value, dtype=torch.float32)
        return value

    def _depends(self, node: fx.Node, value: Any) -> Any:
        name = op_name(node)
        rule = getattr(self, f"_{name.lstrip('_')}", None)
        if rule is not None:
            return rule(node, value)
        if name in CONVOLUTIONS or name == "linear":
            return self._weighted(node, value)
        if name in ("index", "index_select") and any(
            self.depends.get(each) is not None for each in node.all_input_nodes[1:]
        ):
            return _everything(value)  # The image says what is picked.
        if name in MOVES:
            self._pass_shares(node, name)
            return _marks(self._call(node, self._of))
        if name in POOLS:
            return self._pooled(node)
        if name in ("constant_pad_nd", "pad"):
            return self._padded(node, value)
        if is_pointwise(node) or name in CASTS:
            self._pass_shares(node, name)
            depends = torch.zeros(value.shape, dtype=torch.bool, device=value.device)
            for each in node.all_input_nodes:
                if self.depends.get(each) is not None:
                    depends = depends | self.depends[each]
            return depends
        return _everything(value)

    def _pooled(self, node: fx.Node) -> Any:
        marks = self._call(node, self._of)
        if isinstance(marks, Tensor):
            return marks > 0
        return [marks[0] > 0] * len(marks)  # Of a maximum, its place too.

    def _pass_shares(self, node: fx.Node, name: str) -> None:
        same = name in ("dropout", "clone", "contiguous", "alias", "detach", *CASTS)
        if same and node.args and node.args[0] in self.shares:
            self.shares.add(node)

    def _padded(self, node: fx.Node, value: Tensor) -> Tensor:
        mode = argument(node, "mode", "constant") if op_name(node) == "pad" else "constant"
        if mode != "constant":
            return self._call(node, self._of) > 0
        padding = argument(node, "pad")
        return torch.nn.functional.pad(self._of(node.args[0]), padding) > 0  # type: ignore

    def _weighted(self, node: fx.Node, value: Tensor) -> Tensor:
        if self.depends.get(node.args[1]) is not None:  # type: ignore[arg-type]
            return torch.ones_like(value, dtype=torch.bool)
        signal = self._of(node.args[0])  # type: ignore[arg-type]
        weight = (self.values[node.args[1]] != 0).float()  # type: ignore[index]
        return unbiased(node, signal, weight, self.values.__getitem__) > 0.5

    def _mul(self, node: fx.Node, value: Tensor) -> Tensor:
        """Zero times anything is zero."""
        first, second = node.args[:2]
        differs = torch.zeros(value.shape, dtype=torch.bool, device=value.device)
        for one, other in ((first, second), (second, first)):
            depends = self.depends.get(one) if isinstance(one, fx.Node) else None
            if depends is not None:
                differs = differs | (depends & self._may_differ_from_zero(other))
        return differs

    def _may_differ_from_zero(self, operand: Any) -> Any:
        if not isinstance(operand, fx.Node):
            return torch.tensor(operand != 0)
        depends, value = self.depends.get(operand), self.values[operand]
        if not isinstance(value, Tensor):
            return torch.tensor(value != 0)
        return value != 0 if depends is None else (value != 0) | depends

    def _batch_norm(self, node: fx.Node, value: Tensor) -> Tensor:
        depends = self.depends[node.args[0]]  # type: ignore[index]
        weight = node.args[1]
        if weight is None or argument(node, "training"):
            return _everything(value) if argument(node, "training") else depends
        scale = self.values[weight]  # type: ignore[index]
        return depends & (scale != 0).view(1, -1, *[1] * (depends.dim() - 2))

    def _native_batch_norm_legit_no_training(self, node: fx.Node, value: Any) -> list[Tensor]:
        depends, scale = self.depends[node.args[0]], self.values[node.args[1]]  # type: ignore
        scaled = depends & (scale != 0).view(1, -1, *[1] * (depends.dim() - 2))
        return [scaled, *(torch.zeros_like(each, dtype=torch.bool) for each in value[1:])]

    def _layer_norm(self, node: fx.Node, value: Tensor) -> Tensor:
        count = len(argument(node, "normalized_shape"))
        return self._over(node.args[0], tuple(range(-count, 0)))

    _rms_norm = _layer_norm

    def _softmax(self, node: fx.Node, value: Tensor) -> Tensor:
        dim = dimension(argument(node, "dim"), value.dim())
        if dim == value.dim() - 1:
            self.shares.add(node)
        return self._over(node.args[0], (dim,))

    _log_softmax = _softmax

    def _over(self, node: Any, dims: tuple[int, ...]) -> Tensor:
        depends = self.depends[node]
        return depends.float().amax(dims, keepdim=True).bool().expand(depends.shape)

    def _matmul(self, node: fx.Node, value: Tensor) -> Tensor:
        first, second = node.args[:2]
        one, other = (self._of(each).float() for each in (first, second))  # type: ignore
        if first in self.shares and other.dim() > 1:  # Rows sum to one: a constant stays.
            return self._averaged(one.amax(-1, keepdim=True) > 0, second)
        sure = torch.matmul(one, self._may_differ_from_zero(second).float())
        return sure + torch.matmul(self._may_differ_from_zero(first).float(), other) > 0.5

    _bmm = _matmul

    def _averaged(self, moves: Tensor, node: Any) -> Tensor:
        """Which means of rows depend on the image; `moves` says which means are taken otherwise."""
        value, depends = self.values[node], self._of(node).bool()
        spread = value.amax(-2, keepdim=True) - value.amin(-2, keepdim=True)
        alike = spread <= CLOSE * value.abs().amax().clamp(min=1)
        return depends.any(-2, keepdim=True) | (moves & ~alike)

    def _scaled_dot_product_attention(self, node: fx.Node, value: Tensor) -> Tensor:
        query, key, values = node.args[:3]
        moves = self._of(query).amax(-1, keepdim=True) + self._of(key).amax((-1, -2), True)  # type: ignore
        mask = argument(node, "attn_mask")
        if isinstance(mask, fx.Node) and self.depends.get(mask) is not None:
            return _everything(value)
        if self.values[key].shape[:-2] != self.values[query].shape[:-2]:  # type: ignore[index]
            return _everything(value)  # Heads that share keys.
        return self._averaged(moves > 0, values)


def _is_float(kind: Any) -> bool:
    return isinstance(kind, torch.dtype) and kind.is_floating_point


def _has_floats(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_has_floats(each) for each in value)
    return isinstance(value, Tensor)


def _marks(values: Any) -> Any:
    if isinstance(values, list | tuple):
        return [each > 0 for each in values]
    return values > 0


def _everything(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [torch.ones_like(each, dtype=torch.bool) for each in value]
    return torch.ones_like(value, dtype=torch.bool)
