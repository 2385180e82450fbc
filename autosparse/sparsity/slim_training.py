"""Slimming before training: units that nobody listens to are cut out of a model's own layers.

A unit whose readers have all lost their weights gets no gradient and gives none, so training is the
same without it, but for rounding: under an optimizer that treats every weight by itself, and where
dropout draws nothing for such units. Its own weights would decay at most, and nothing reads it.

A unit that is read stays, even if no weight of its own is left: a norm turns its zeros into its
shift, which is trained.

The layers of the model itself get smaller, so that whatever trains a model trains this one.
Therefore units stay, too, where the model's Python names their number (heads of an attention,
channels that are split or shuffled), and wherever `slim` lets them stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from autosparse.core.errors import UsageError
from autosparse.models.contract import of_the_machine
from autosparse.models.restore import copied
from autosparse.models.zoo import expected_shape, owner, unwrapped
from autosparse.sparsity.slim import check_logits, random_images
from autosparse.sparsity.slim_choice import Choice
from autosparse.sparsity.slim_constants import Facts, facts
from autosparse.sparsity.slim_graph import (
    CONVOLUTIONS,
    argument,
    dimension,
    op_name,
    put_tensor,
    tensor_at,
    traced,
)
from autosparse.sparsity.slim_moves import Moves
from autosparse.sparsity.slim_units import Dims
from autosparse.sparsity.ticket import Ticket, load_state

Places: TypeAlias = "list[Tensor | None]"
"""Per dimension of a tensor the places that stay, ascending; None where all do."""
LEAST_LOGIT = 1e-3
"""Before training logits may be small; they are compared by the largest of them, or by this."""
CONVOLVING = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Slimmed:
    """A smaller model to train, its ticket, and the way back."""

    model: nn.Module
    """Dense; `compact` it with the ticket below."""
    ticket: Ticket
    """Of the smaller model."""
    start: Ticket
    """Of the whole model."""
    places: Mapping[str, Places]
    """Per tensor of the state dict that got smaller."""

    def whole(self, trained: Ticket) -> Ticket:
        """Return a trained ticket of the smaller model as one of the whole model.

        Masks are those of the start, too. What was cut out has its values of the start: weights
        that nobody listens to, with their biases, norms and running statistics.
        Raises ValueError if the masks have changed in training.
        """
        if trained.fingerprint != self.ticket.fingerprint:
            raise ValueError("the masks have changed since the model was made smaller")
        state, small = self.start.dense_state(), trained.dense_state()
        for name, value in state.items():
            state[name] = _put_back(value, small[name], self.places.get(name))
        values = {name: state[name][mask] for name, mask in self.start.masks.items()}
        rest = {name: state[name] for name in self.start.rest}
        return replace(trained, masks=self.start.masks, values=values, rest=rest)


def slim_for_training(
    model: nn.Module, ticket: Ticket, shape: tuple[int, ...] | None = None
) -> Slimmed:
    """Return a model without the units that no kept weight reads; `model` is not changed.

        small = slim_for_training(model, ticket)
        network = compact(small.model, small.ticket)  # … train it …
        trained = small.whole(Ticket.from_compact(network, small.ticket, card))

    Args:
        model: dense, of the ticket.
        ticket: its masks say what is read; they must not move in training.
        shape: [C, H, W] of an image; by default what the model was built for.

    Raises UsageError where the model is not the ticket's, or cannot be traced or made smaller.
    """
    model = unwrapped(model)
    ticket.check(model)
    shape = shape or expected_shape(model)
    if shape is None:
        raise UsageError(
            f"{type(model).__name__} does not tell what images it takes: give the `shape` of one"
        )
    whole = copied(model)
    load_state(whole, ticket)
    images = random_images(whole, torch.zeros(2, *shape))
    rules = _Rules(whole, ticket.masks, images)
    choice = Choice(rules)
    small = copied(whole)
    places = _cut(small, rules, choice)
    _tell_layers(small, rules, choice)
    _check(whole, small, images)
    for one, other in zip(small.modules(), model.modules(), strict=True):
        one.training = other.training
    return Slimmed(small, _cut_ticket(ticket, places), ticket, places)


class _Rules(Moves):
    """What goes together where Python code stays: units stay whose number that names."""

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor], images: Tensor) -> None:
        self.model = model
        module = traced(model, images)
        kept = {id(model.get_parameter(name)): mask for name, mask in masks.items()}
        for name, value in list(module.named_parameters()):
            mask = kept.get(id(model.get_parameter(name)))  # Kept weights may be zero by chance.
            used = torch.ones_like(value) if mask is None else mask.to(value)
            put_tensor(module, name, used.detach(), trained=True)
        self.known = {*model.state_dict(), *dict(model.named_buffers())}
        super().__init__(module, _without_constants(facts(module, images)))

    def _follow(self, node: fx.Node) -> None:
        super()._follow(node)
        if node.op == "get_attr" and node.target not in self.known:  # Made by the model's Python.
            for positions in self.dims[node]:
                self.units.keep(positions)

    def _sizes_known(self, node: fx.Node, dims: Dims) -> Dims:
        wanted: Any = None if op_name(node) == "unflatten" else node.args[1]
        return self._keep_named(node, dims, wanted)

    def _expand(self, node: fx.Node) -> Dims:
        return self._keep_named(node, super()._expand(node), node.args[1])

    def _keep_named(self, node: fx.Node, dims: Dims, sizes: Any) -> Dims:
        for place, positions in enumerate(dims):
            if positions is not None and (sizes is None or sizes[place] != -1):
                self._keep(positions, node)
                dims[place] = None
        return dims

    def _slice(self, node: fx.Node) -> Dims:
        source = node.args[0]
        dim = dimension(argument(node, "dim", 0), len(self._shape(source)))
        if self._shape(node)[dim] != self._shape(source)[dim]:
            self._keep(self.dims[source][dim], node)  # type: ignore[index]
        return super()._slice(node)

    def _split_with_sizes(self, node: fx.Node) -> Any:
        source = node.args[0]
        dim = dimension(argument(node, "dim", 0), len(self._shape(source)))
        self._keep(self.dims[source][dim], node)  # type: ignore[index]
        return super()._split_with_sizes(node)

    _split = _chunk = _split_with_sizes

    def _convolution(self, node: fx.Node) -> Dims:
        weight: Any = node.args[1]
        if argument(node, "groups", 1) > 1 and not (
            weight.op == "get_attr" and isinstance(owner(self.model, weight.target)[0], CONVOLVING)
        ):
            return self._unknown(node)
        return super()._convolution(node)


def _without_constants(facts: Facts) -> Facts:
    """Let no channel go that is read, whether it is a constant or not."""
    for inputs in facts.constant_inputs.values():
        inputs.constant.zero_()
    for product in facts.zero_products.values():
        product.zero_()
    return facts


def _cut(model: nn.Module, rules: _Rules, choice: Choice) -> dict[str, Places]:
    """Make tensors smaller, in place; return what stays of those of the state dict."""
    stays: dict[int, Places] = {}
    for name, dims in rules.tensors.items():
        kept = [choice.kept(positions) for positions in dims]
        if any(each is not None for each in kept):
            places = [None if each is None else torch.from_numpy(each) for each in kept]
            stays[id(tensor_at(model, name))] = places
    state = model.state_dict(keep_vars=True)
    places_of = {name: stays[id(each)] for name, each in state.items() if id(each) in stays}
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for attribute, tensor in tensors.items():
                if tensor is None or id(tensor) not in stays:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = _like(tensor, _taken(tensor.detach(), stays[id(tensor)]))
                tensors[attribute] = made[id(tensor)]  # type: ignore[assignment]
    return places_of


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _taken(tensor: Tensor, places: Places | None) -> Tensor:
    for dim, each in enumerate(places or []):
        if each is not None:
            tensor = tensor.index_select(dim, each.to(tensor.device))
    return tensor


def _put_back(whole: Tensor, small: Tensor, places: Places | None) -> Tensor:
    if places is None:
        return small
    index = []
    for dim, (each, size) in enumerate(zip(places, whole.shape, strict=True)):
        there = torch.arange(size) if each is None else each
        index.append(there.view(-1, *[1] * (whole.dim() - 1 - dim)))
    values = whole.to(small.dtype, copy=True)
    values[tuple(index)] = small
    return values


def _cut_ticket(ticket: Ticket, places: Mapping[str, Places]) -> Ticket:
    state = {name: _taken(each, places.get(name)) for name, each in ticket.dense_state().items()}
    masks = {name: _taken(mask, places.get(name)) for name, mask in ticket.masks.items()}
    return replace(
        ticket,
        masks=masks,
        values={name: state[name][mask] for name, mask in masks.items()},
        rest={name: state[name] for name in ticket.rest},
    )


def _tell_layers(model: nn.Module, rules: _Rules, choice: Choice) -> None:
    """Give layers the numbers of channels that their tensors have now."""
    read: dict[str, int] = {}
    for node in rules.module.graph.nodes:
        if op_name(node) in CONVOLUTIONS and argument(node, "groups", 1) > 1:
            kept = choice.kept(rules.dims[node.args[0]][1])
            if kept is not None:
                read[str(node.args[1].target)] = len(kept)
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
        elif isinstance(layer, NORMS) and (layer.affine or layer.track_running_stats):
            layer.num_features = len(layer.weight if layer.affine else layer.running_mean)  # type: ignore
        elif isinstance(layer, CONVOLVING):
            each = layer.weight.shape[1]
            layer.groups = read.get(f"{path}.weight", each * layer.groups) // each
            layer.out_channels, layer.in_channels = len(layer.weight), each * layer.groups


def _check(whole: nn.Module, small: nn.Module, images: Tensor) -> None:
    """Raise UsageError if the smaller model does not run, RunFailed if it says something else."""
    small.eval()
    if images.dtype in (torch.float16, torch.bfloat16):  # Their rounding would hide faults.
        whole, small, images = copied(whole).double(), copied(small).double(), images.double()
    try:
        check_logits(whole, small, images, "train it without training.slim", LEAST_LOGIT)
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
        if of_the_machine(error):
            raise
        line = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{type(whole).__name__} counts on its number of units, so it cannot be made smaller "
            f"({type(error).__name__}: {line}); train it without training.slim"
        ) from error
