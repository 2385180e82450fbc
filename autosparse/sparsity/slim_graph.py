"""A network as a graph of ATen operators, and the small questions that slimming asks of it."""

from __future__ import annotations

import math
import operator
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn

from autosparse.core.errors import UsageError

GUARDS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size")
"""Checks that an export writes into the graph; they name shapes and precisions of before."""
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
UNTAGGED = {"hardswish", "hardsigmoid", "hardtanh", "relu6", "mish", "selu", "celu"}
"""Pointwise operators that torch does not tag as such."""


def traced(model: nn.Module, images: Tensor) -> fx.GraphModule:
    """Return `model`, in eval mode, as a graph without side effects; the batch stays free.

    Parameters and buffers keep their names. Raises UsageError where the network cannot be traced.
    """
    if len(images) < 2:
        raise ValueError("a batch of one would be traced as a constant; give two images")
    was_training = model.training
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                model.eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)
            )
            module = program.module()
            if not _without_side_effects(module.graph):  # type: ignore[arg-type]
                module = program.run_decompositions({}).module()  # Takes three times as long.
    except Exception as error:  # Whatever the tracer meets in a model that it does not know.
        line = next((each for each in str(error).splitlines() if each.strip()), "")
        raise UsageError(
            f"{type(model).__name__} cannot be traced by torch.export, so it cannot be slimmed "
            f"({type(error).__name__}: {line.strip()[:200]})"
        ) from None
    finally:
        model.train(was_training)
    if not isinstance(module, fx.GraphModule):
        raise UsageError(f"{type(model).__name__}: torch.export gave no graph")
    for name in ("train", "eval"):  # An export's own ones raise.
        module.__dict__.pop(name, None)
    _inline(module.eval())
    for node in list(module.graph.nodes):
        if (node.op == "call_module" and not node.users) or op_name(node) in GUARDS:
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _inline(module: fx.GraphModule) -> None:
    """Put graphs inside of the graph in its place: parts under `torch.autocast(enabled=False)`."""
    for node in list(module.graph.nodes):
        name = getattr(node.target, "__name__", "")
        if name == "wrap_with_autocast" and not node.args[2]:
            inner, inputs = node.args[4], node.args[5:]
        elif name == "wrap_with_set_grad_enabled":
            inner, inputs = node.args[1], node.args[2:]
        else:
            continue
        graph = operator.attrgetter(inner.target)(module).graph
        places = [each for each in graph.nodes if each.op == "placeholder"]
        with module.graph.inserting_before(node):
            copies = dict(zip(places, inputs, strict=True))
            found = module.graph.graph_copy(graph, copies)
        for user in list(node.users):
            user.replace_all_uses_with(found[user.args[1]])  # type: ignore[index]
            module.graph.erase_node(user)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    for node in module.graph.nodes:
        if node.op == "get_attr" and not isinstance(tensor_at(module, node.target), Tensor):
            user = next(iter(node.users))
            raise UsageError(
                f"the network has a part that is a graph of its own ({user.target}): it cannot be "
                "slimmed"
            )


def _without_side_effects(graph: fx.Graph) -> bool:
    """Let operators that overwrite what they read give something new; return whether that works.

    It does where nothing else looks at the memory that is overwritten.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        source, name = node.args[0], schema.name.rpartition("::")[2]
        packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
        overload = getattr(packet, node.target._overloadname, None)
        shared = isinstance(source, fx.Node) and (
            source.op != "call_function"
            or _is_view(source)
            or any(_is_view(user) for user in source.users if order[user] < order[node])
        )
        if overload is None or shared or not isinstance(source, fx.Node):
            return False
        node.target = overload
        source.replace_all_uses_with(node, lambda user, node=node: order[user] > order[node])
    return True


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.is_mutable:
        return node.op == "call_function" and op_name(node) == "getitem"
    aliases = any(each.alias_info for each in schema.returns)
    return aliases or op_name(node) in ("reshape", "flatten", "contiguous", "to", "getitem")


def op_name(node: fx.Node) -> str:
    """Return the operator without its namespace and overload: `conv2d`, `view`, `getitem`."""
    if node.op != "call_function":
        return node.op
    if node.target is operator.getitem:
        return "getitem"
    schema = getattr(node.target, "_schema", None)
    return schema.name.rpartition("::")[2] if schema is not None else str(node.target)


def is_pointwise(node: fx.Node) -> bool:
    """Does every output element hear of the input elements at its own place only?"""
    tagged = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return tagged or op_name(node) in UNTAGGED


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """Return an argument by the name that the operator's schema gives it."""
    if name in node.kwargs:
        return node.kwargs[name]
    names = [each.name for each in node.target._schema.arguments]  # type: ignore[union-attr]
    place = names.index(name)
    return node.args[place] if place < len(node.args) else default


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Replace an argument by the name that the operator's schema gives it."""
    names = [each.name for each in node.target._schema.arguments]  # type: ignore[union-attr]
    place = names.index(name)
    if name not in node.kwargs and place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(name, value)


def dimension(index: int, count: int) -> int:
    """Return a dimension counted from the front."""
    return index + count if index < 0 else index


def tensor_at(module: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer that a `get_attr` node names."""
    return operator.attrgetter(name)(module)


def put_tensor(module: nn.Module, name: str, value: Tensor, *, trained: bool) -> None:
    """Set a parameter or buffer by its dotted name; modules on the way are made."""
    path, _, attribute = name.rpartition(".")
    owner = module
    for part in path.split(".") if path else ():
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    for tensors in (owner._parameters, owner._buffers):
        tensors.pop(attribute, None)
    owner.__dict__.pop(attribute, None)
    if trained:
        owner.register_parameter(attribute, nn.Parameter(value, requires_grad=True))
    else:
        owner.register_buffer(attribute, value)


def free_name(module: nn.Module, wanted: str) -> str:
    """Return `wanted`, or that with a number, such that no tensor has the name yet."""
    taken = {name for name, _ in module.named_parameters()}
    taken |= {name for name, _ in module.named_buffers()}
    number, name = 1, wanted
    while name in taken:
        number, name = number + 1, f"{wanted}_{number}"
    return name


def size(shape: tuple[int, ...]) -> int:
    """Return the number of elements of a shape."""
    return math.prod(shape)
