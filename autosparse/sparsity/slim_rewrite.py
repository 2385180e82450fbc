"""Makes tensors smaller, and what names their sizes, once it is chosen which units go."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, fx

from autosparse.sparsity.slim_choice import Choice
from autosparse.sparsity.slim_constants import CLOSE, Facts
from autosparse.sparsity.slim_fold import stored
from autosparse.sparsity.slim_graph import (
    CONVOLUTIONS,
    argument,
    dimension,
    free_name,
    op_name,
    put_exact,
    put_tensor,
    set_argument,
    tensor_at,
    unbiased,
)
from autosparse.sparsity.slim_rules import Rules, Site


def rewrite(module: fx.GraphModule, facts: Facts, rules: Rules, choice: Choice) -> None:
    """Cut what goes out of the graph, in place; what it adds as constants is added further on."""
    constants = {
        site.node: constant
        for site in rules.sites
        if (constant := _removed_constant(module, facts, site, choice)) is not None
    }
    for node in list(module.graph.nodes):
        if node.op == "call_function":
            _resize(module, node, facts, rules, choice)
    for name, dims in rules.tensors.items():
        _cut(module, name, dims, choice)
    for node, value in constants.items():
        _add_constant(module, node, value, rules, choice)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    _drop_unused(module)
    module.recompile()


def _removed_constant(
    module: fx.GraphModule, facts: Facts, site: Site, choice: Choice
) -> Tensor | None:
    """Return what the channels that go add to a sum: float64 [1, …], or None for nothing."""
    inputs = facts.constant_inputs.get(site.node)
    if inputs is None or site.used is None:
        return None
    goes = ~choice.staying(site.reads) & inputs.constant.cpu().numpy() & ~inputs.zero.cpu().numpy()
    if not goes.any():
        return None
    node = site.node
    dim = 1 if op_name(node) in CONVOLUTIONS else inputs.values.dim() - 1
    shape = [-1 if place == dim else 1 for place in range(inputs.values.dim())]
    keep = torch.from_numpy(goes).to(inputs.values.device)
    weight = tensor_at(module, str(node.args[1].target)).detach().double()  # type: ignore
    with torch.no_grad():
        offset = unbiased(node, inputs.values * keep.view(shape), weight, lambda each: each)
    return offset if offset.any() else None


def _cut(module: fx.GraphModule, name: str, dims: list, choice: Choice) -> None:
    tensor = tensor_at(module, name)
    value = tensor.detach()
    for dim, positions in enumerate(dims):
        places = choice.kept(positions)
        if places is not None:
            index = torch.from_numpy(places).to(value.device)
            value = value.index_select(dim, index)
    if value.shape != tensor.shape:
        if _channels_last(tensor):
            like = torch.empty_like(value, memory_format=torch.channels_last)
            value = like.copy_(value)
        put_tensor(module, name, value, trained=isinstance(tensor, torch.nn.Parameter))


def _channels_last(tensor: Tensor) -> bool:
    """Are channels what lies side by side? Strides tell, also where a kernel has one place."""
    return tensor.dim() == 4 and tensor.stride(1) == 1 and tensor.stride(3) == tensor.shape[1] > 1


def _add_constant(
    module: fx.GraphModule, node: fx.Node, value: Tensor, rules: Rules, choice: Choice
) -> None:
    """Add a constant to what a layer gives: in its bias, or where it differs by place, after it."""
    channel = 1 if op_name(node) in CONVOLUTIONS else value.dim() - 1
    for dim, positions in enumerate(rules.dims[node]):
        places = choice.kept(positions)
        if places is not None and value.shape[dim] > 1:
            value = value.index_select(dim, torch.from_numpy(places).to(value.device))
    others = [dim for dim in range(value.dim()) if dim != channel]
    first = value
    for dim in others:
        first = first.narrow(dim, 0, 1)
    weight = tensor_at(module, str(node.args[1].target))  # type: ignore[union-attr]
    if (value - first).abs().amax() <= CLOSE * value.abs().amax().clamp(min=1):
        _add_to_bias(module, node, first.flatten(), weight)
        return
    node, value = _behind_norm(module, node, value)
    with module.graph.inserting_after(node):
        sum_node = module.graph.call_function(torch.ops.aten.add.Tensor, (node, node))
    node.replace_all_uses_with(sum_node, lambda user: user is not sum_node)
    with module.graph.inserting_before(sum_node):
        map_node = stored(module, value, weight, f"constants.{node.name}")
    sum_node.args = (node, map_node)


def _behind_norm(module: fx.GraphModule, node: fx.Node, value: Tensor) -> tuple[fx.Node, Tensor]:
    """Return the norm that alone reads a layer, and a constant [1, C, …] as it comes out of it.

    So that engines can go on making one layer of the two. Other users get both as they are.
    """
    user = next(iter(node.users))
    if len(node.users) > 1 or op_name(user) != "batch_norm":
        return node, value
    gain, variance = argument(user, "weight"), argument(user, "running_var")
    read = [each for each in (gain, variance) if isinstance(each, fx.Node)]
    if argument(user, "training") or not isinstance(variance, fx.Node):
        return node, value  # It goes by the batch.
    if any(each.op != "get_attr" for each in read):
        return node, value  # They are computed.
    scale = (tensor_at(module, str(variance.target)).double() + argument(user, "eps")).rsqrt()
    if isinstance(gain, fx.Node):
        scale = scale * tensor_at(module, str(gain.target)).detach().double()
    return user, value * scale.view(-1, *[1] * (value.dim() - 2))


def _add_to_bias(module: fx.GraphModule, node: fx.Node, value: Tensor, weight: Tensor) -> None:
    bias = argument(node, "bias")
    path = str(node.args[1].target).rpartition(".")[0]  # type: ignore[union-attr]
    name = free_name(module, f"{path}.bias" if path else "bias")
    if isinstance(bias, fx.Node):
        value = value + tensor_at(module, str(bias.target)).detach().double()
        named = [each for each in module.graph.nodes if each.target == bias.target]
        if len(named) == 1 == len(bias.users):
            name = str(bias.target)
    put_exact(module, name, value, weight, trained=True)
    with module.graph.inserting_before(node):
        set_argument(node, "bias", module.graph.get_attr(name))


def _resize(
    module: fx.GraphModule, node: fx.Node, facts: Facts, rules: Rules, choice: Choice
) -> None:
    """Put smaller numbers where an operator's arguments name sizes."""
    name = op_name(node)
    if name in ("view", "reshape", "_unsafe_view", "expand"):
        sizes = list(node.args[1])  # type: ignore[arg-type]
        for dim, positions in enumerate(rules.dims[node]):
            places = choice.kept(positions)
            if places is not None and sizes[dim] != -1:
                sizes[dim] = len(places)
        node.update_arg(1, sizes)
    elif name == "slice":
        _resize_slice(node, facts, rules, choice)
    elif name in ("split", "split_with_sizes", "chunk"):
        _resize_split(node, facts, rules, choice)
    elif name in CONVOLUTIONS and argument(node, "groups", 1) > 1:
        _resize_groups(node, facts, rules, choice)
    elif name == "scaled_dot_product_attention":
        places = choice.kept(rules.dims[node.args[0]][-1])  # type: ignore[index]
        if places is not None and argument(node, "scale") is None:
            node.update_kwarg("scale", facts.shapes[node.args[0]][-1] ** -0.5)  # type: ignore


def _resize_slice(node: fx.Node, facts: Facts, rules: Rules, choice: Choice) -> None:
    source = node.args[0]
    dim = dimension(argument(node, "dim", 0), len(facts.shapes[source]))  # type: ignore
    before = rules.dims[source][dim]  # type: ignore[index]
    places = choice.kept(before)
    if places is None or rules.dims[node][dim] is None:
        return
    start, end, _ = slice(argument(node, "start"), argument(node, "end")).indices(len(before))
    set_argument(node, "start", int(np.searchsorted(places, start)))
    set_argument(node, "end", int(np.searchsorted(places, end)))


def _resize_split(node: fx.Node, facts: Facts, rules: Rules, choice: Choice) -> None:
    source = node.args[0]
    dim = dimension(argument(node, "dim", 0), len(facts.shapes[source]))  # type: ignore
    if choice.kept(rules.dims[source][dim]) is None:  # type: ignore[index]
        return
    sizes = [
        shape[dim] if (places := choice.kept(part[dim])) is None else len(places)
        for part, shape in zip(rules.dims[node], facts.shapes[node], strict=True)
    ]
    node.target = torch.ops.aten.split_with_sizes.default
    node.args, node.kwargs = (source, sizes, dim), {}


def _resize_groups(node: fx.Node, facts: Facts, rules: Rules, choice: Choice) -> None:
    places = choice.kept(rules.dims[node.args[0]][1])  # type: ignore[index]
    if places is None:
        return
    columns = choice.kept(rules.dims[node.args[1]][1])  # type: ignore[index]
    each = facts.shapes[node.args[1]][1] if columns is None else len(columns)  # type: ignore
    set_argument(node, "groups", len(places) // each)


def _drop_unused(module: fx.GraphModule) -> None:
    """Delete tensors that the graph names no longer, and modules that are left empty."""
    named = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, _ in tensors:
        if name not in named:
            path, _, attribute = name.rpartition(".")
            owner = module.get_submodule(path)
            owner._parameters.pop(attribute, None)
            owner._buffers.pop(attribute, None)
    module.delete_all_unused_submodules()
    for name, child in reversed(list(module.named_modules())):
        if name and not child.state_dict():
            path, _, attribute = name.rpartition(".")
            module.get_submodule(path)._modules.pop(attribute, None)
