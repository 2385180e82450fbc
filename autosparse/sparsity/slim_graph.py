"""A network as a graph of ATen operators, and the small questions that slimming asks of it."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from autosparse.core.errors import UsageError
from autosparse.models.restore import evaluating

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
    try:
        with warnings.catch_warnings(), torch.no_grad(), evaluating(model):
            warnings.simplefilter("ignore")
            program = torch.export.export(
                model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)
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
    if not isinstance(module, fx.GraphModule):
        raise UsageError(f"{type(model).__name__}: torch.export gave no graph")
    for name in ("train", "eval"):  # An export's own ones raise.
        module.__dict__.pop(name, None)
    _inline(module.eval())
    for node in list(module.graph.nodes):
        if (node.op == "call_module" and not node.users) or op_name(node) in GUARDS:
            module.graph.erase_node(node)
        elif node.target is torch.ops.aten.view.default:  # It fails where memory lies otherwise.
            node.target = torch.ops.aten.reshape.default
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
            copied = module.graph.graph_copy(graph, copies)
        for user in list(node.users):
            user.replace_all_uses_with(copied[user.args[1]])  # type: ignore[index]
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
    """Does every output element depend on the input elements at its own place only?"""
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
    if name in node.kwargs or place > len(node.args):
        node.update_kwarg(name, value)
    else:
        node.args = (*node.args[:place], value, *node.args[place + 1 :])


def unbiased(node: fx.Node, signal: Any, weight: Any, of: Callable[[fx.Node], Any]) -> Tensor:
    """Return what a convolution or linear layer makes of a signal, without its bias."""
    rest, others = fx.node.map_arg((node.args[3:], node.kwargs), of)
    kwargs = {name: value for name, value in others.items() if name != "bias"}
    return node.target(signal, weight, None, *rest, **kwargs)  # type: ignore[operator]


def dimension(index: int, count: int) -> int:
    """Return a dimension counted from the front."""
    return index + count if index < 0 else index


def tensor_at(module: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer that a `get_attr` node names."""
    return operator.attrgetter(name)(module)


LATER = "precisions"
"""Key of a graph's `meta`: name of a tensor that slimming made -> its precision in the end."""


def put_exact(
    module: fx.GraphModule, name: str, value: Tensor, like: Any, *, trained: bool
) -> None:
    """Set a tensor that slimming made, in float64 until `rounded`; `like` has its precision."""
    module.meta.setdefault(LATER, {})[name] = like.dtype
    put_tensor(module, name, value.double(), trained=trained)


def rounded(module: fx.GraphModule) -> None:
    """Give all tensors that slimming made the precision that they are to have."""
    left = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, dtype in module.meta.pop(LATER, {}).items():
        if name in left:  # Else nobody reads it any more.
            trained = isinstance(left[name], nn.Parameter)
            put_tensor(module, name, left[name].detach().to(dtype), trained=trained)


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
    """Return `wanted`, or that with numbers, such that nothing has the name yet.

    Modules on the way may be there. Methods of modules are names, too.
    """
    owner: Any = module
    *path, last = wanted.split(".")
    names = []
    for part in (*path, last):
        number, name = 1, part
        while (there := getattr(owner, name, None)) is not None:
            if isinstance(there, nn.Module) and len(names) < len(path):
                break
            number, name = number + 1, f"{part}_{number}"
        names.append(name)
        owner = nn.Module() if there is None else there
    return ".".join(names)
