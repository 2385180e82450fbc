"""Parts of a graph that are constants become stored tensors; whole branches go with that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from autosparse.sparsity.slim_constants import CLOSE, Facts
from autosparse.sparsity.slim_graph import free_name, is_pointwise, op_name, put_exact, put_tensor

ALIKE = 1e-10
"""Rows of a constant are one row if they differ by less, relative to the largest value."""


def fold(module: fx.GraphModule, facts: Facts) -> None:
    """Replace what does not depend on the image by its value, where something else reads it."""
    for node, value in facts.constants.items():
        readers = [user for user in node.users if user not in facts.constants]
        if readers and value.is_floating_point() and value.numel() and _whole(node) is not None:
            _replace(module, node, value, facts)
    _clean(module)


def _whole(node: fx.Node) -> list[bool] | None:
    """Return per dimension whether it is the batch; None where a size is computed otherwise."""
    shape = getattr(node.meta.get("val"), "shape", None)
    if shape is None:
        return None
    free = [not isinstance(each, int) for each in shape]
    if sum(free) > 1 or any(
        f and not str(n).isidentifier() for f, n in zip(free, shape, strict=True)
    ):
        return None
    return free


def _replace(module: fx.GraphModule, node: fx.Node, value: Tensor, facts: Facts) -> None:
    free = _whole(node)
    assert free is not None
    for place, each in enumerate(free):
        if each:
            first = value.narrow(place, 0, 1)
            if (value - first).abs().amax() > CLOSE * value.abs().amax().clamp(min=1):
                return  # It differs along the batch: positions of a window, say.
            value = first
    for user in list(node.users):
        if _adds_nothing(user, node, value, facts):
            user.replace_all_uses_with(_other(user, node))
    if not node.users:
        return
    with module.graph.inserting_before(node):
        constant = stored(module, value, node.meta["val"], f"constants.{node.name}")
        if any(not _broadcasts(user, node, facts) for user in node.users):
            sizes = [
                _batch(module) if f else n for f, n in zip(free, facts.shapes[node], strict=True)
            ]
            constant = module.graph.call_function(torch.ops.aten.expand.default, (constant, sizes))
            facts.shapes[constant] = facts.shapes[node]
    node.replace_all_uses_with(constant)


def _adds_nothing(user: fx.Node, node: fx.Node, value: Tensor, facts: Facts) -> bool:
    if op_name(user) != "add" or len(user.all_input_nodes) != 2 or value.any():
        return False
    return facts.shapes[_other(user, node)] == facts.shapes[user]


def _other(user: fx.Node, node: fx.Node) -> fx.Node:
    return next(each for each in user.all_input_nodes if each is not node)


def _broadcasts(user: fx.Node, node: fx.Node, facts: Facts) -> bool:
    """Does the user take a smaller tensor, since another one has the shape of what it gives?"""
    others = [each for each in user.all_input_nodes if each is not node]
    return is_pointwise(user) and any(facts.shapes[o] == facts.shapes[user] for o in others)


def _batch(module: fx.GraphModule) -> fx.Node:
    """Return the node that says how many images there are."""
    images = next(node for node in module.graph.nodes if node.op == "placeholder")
    sizes = torch.ops.aten.sym_size.int
    for node in images.users:
        if node.target is sizes and node.args[1] == 0 and node is images.next:
            return node
    with module.graph.inserting_after(images):
        return module.graph.call_function(sizes, (images, 0))


def stored(module: fx.GraphModule, value: Tensor, like: Any, name: str) -> fx.Node:
    """Insert a constant; dimensions that repeat are stored once and spread by indices.

    `like` has the precision that it gets in the end.

    A border of zeros around a picture makes a constant channel differ at the edges only, so a few
    rows and columns hold all of it.
    """
    indices: dict[int, Tensor] = {}
    for dim in range(1, value.dim()):
        smaller, places = _distinct(value, dim)
        if smaller.shape[dim] == 1:
            value = smaller
        elif value.dim() == 4 and dim > 1 and 2 * smaller.shape[dim] <= len(places):
            value, indices[dim] = smaller, places
    name = free_name(module, name)
    put_exact(module, name, value.contiguous(), like, trained=False)
    tensor = module.graph.get_attr(name)
    for dim, places in indices.items():
        index = free_name(module, f"{name}_places_{dim}")
        put_tensor(module, index, places, trained=False)
        args = (tensor, dim, module.graph.get_attr(index))
        tensor = module.graph.call_function(torch.ops.aten.index_select.default, args)
    return tensor


def _distinct(value: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the slices along `dim` that differ, and for each place which one it is."""
    rows = value.movedim(dim, 0).flatten(1)
    close = ALIKE * rows.abs().amax().clamp(min=1)
    first: list[int] = []
    places = []
    for number, row in enumerate(rows):
        same = (rows[first] - row).abs().amax(1) <= close if first else torch.zeros(0)
        if same.any():
            places.append(int(same.nonzero()[0]))
        else:
            places.append(len(first))
            first.append(number)
    kept = torch.tensor(first, device=value.device)
    return value.index_select(dim, kept), torch.tensor(places, device=value.device)


def _clean(module: fx.GraphModule) -> None:
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
