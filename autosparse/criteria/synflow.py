"""SynFlow: iterative pruning by synaptic flow, without data.

Paper: H. Tanaka et al., Pruning neural networks without any data by iteratively conserving
synaptic flow (NeurIPS 2020), arXiv 2006.05467, equation 4 and algorithm 1: with all parameters
replaced by their absolute values and an input of ones, R = sum of the outputs and
score = |θ * dR/dθ|; over n rounds the density falls as final^(k/n) (n = 100).

As in the paper's code batch norm is in eval mode, but for its epsilon. Departures: biases and
shifts are left out, as in the paper's equation (its code adds their absolute values); kernels are
not standardised (NFNet); ReLU6 counts as ReLU; layers that are no linear maps (softmax, layer
norm, GELU) stay as they are, since the paper covers piecewise linear networks only. Weights
pruned in an earlier round rank below all others.

Outside of the paper's networks, or in few rounds, a round can empty a layer; then nothing flows
any more, and all scores would be zero. So every layer keeps its best weight in every round, if as
many weights are kept as there are layers (guard `none` cannot remove it later). A layer without
flow is ranked by its last flow, below all layers that have some; if nothing flows at all, the last
flow decides. Where no layer is emptied, and no part cut off, this changes nothing.

Deep networks overflow in float32. Where the copy turns out to be linear from block to block, the
signal is divided by a power of two after every block: all paths run through those points, so
every score is scaled alike. Elsewhere everything is computed in float64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import TypeGuard

import torch
from torch import Tensor, nn

from autosparse.criteria.base import Scores, register
from autosparse.criteria.rounds import Take, any_along, shrink
from autosparse.models import roles
from autosparse.models.contract import outputs_of
from autosparse.models.gradients import backward_one_by_one, spend
from autosparse.models.zoo import owner
from autosparse.sparsity.counts import keep_count
from autosparse.sparsity.masks import nonzero
from autosparse.sparsity.paths import (
    CannotFollow,
    followed,
    image_shape,
    rescale_between_blocks,
    without_shifts,
)


@register("synflow", needs_data=False)
def synflow(model, parameters, batches, loss_fn, *, sparsity: float, rounds: int = 100) -> Scores:
    """Return the synaptic flow of the last round; weights that fell in round k score k - n - 1.

    The flow is right up to a power of two, common to all weights. Raises CannotFollow where it is
    not finite.

    Args:
        sparsity: fraction of weights to remove in the end.
        rounds: n, over which the density falls exponentially.
    """
    linear = without_shifts(model, parameters)
    _simplify(linear)
    _channels_last(linear)
    weights: dict[str, Tensor] = {name: linear.get_parameter(name) for name in parameters}
    like = next(iter(weights.values()))
    ones = torch.ones((1, *image_shape(model, batches)), dtype=like.dtype, device=like.device)
    with followed(model):
        elsewhere = roles.of(linear, ones).elsewhere
        rescaled = rescale_between_blocks(linear, ones)
    channels = _Channels(linear, list(parameters), elsewhere)
    if rescaled:
        _without_relu(linear)
    else:
        linear, ones = linear.double(), ones.double()

    def gradient(take: Take) -> None:
        spend(len(ones))
        with followed(model):
            flow = outputs_of(linear, ones).sum()
            if not torch.isfinite(flow):
                raise CannotFollow("the sum over all paths, with weights >= 0, is not finite")
            backward_one_by_one(flow, channels.weights(), take if rescaled else finite(take))

    def finite(take: Take) -> Take:
        """Check gradients too: a softmax's may overflow where the flow itself is finite."""

        def taken(place: int, slope: Tensor) -> None:
            if not torch.isfinite(slope.sum()):
                raise CannotFollow(
                    "the gradient of the sum over all paths, with weights >= 0, is not finite"
                )
            take(place, slope)

        return taken

    total = sum(weight.numel() for weight in weights.values())
    floor = int(keep_count(total, sparsity) >= len(weights))
    return shrink(
        weights,
        gradient,
        sparsity,
        rounds,
        min_per_layer=floor,
        narrow=channels.narrow,
        lasting=True,
    )


class _Channels:
    """Computes, of every layer, only the channels that a living weight reads or writes.

    A weight that several modules share stays whole, and so does that of a grouped convolution, or
    one that is used `elsewhere` than in its own module's forward.
    """

    def __init__(self, linear: nn.Module, names: list[str], elsewhere: Collection[str]) -> None:
        self.linear, self.names = linear, names
        modules = linear.modules()
        held = Counter(id(each) for one in modules for each in one.parameters(recurse=False))
        self.layers: dict[str, _Layer] = {}
        for name in names:
            module, _ = owner(linear, name)
            if (
                name not in elsewhere
                and _maps_channels(module)
                and held[id(linear.get_parameter(name))] == 1
            ):
                self.layers[name] = _Layer(module)

    def weights(self) -> list[Tensor]:
        """Return the tensors that the gradient is taken with respect to at present."""
        return [self.linear.get_parameter(name) for name in self.names]

    def narrow(
        self, places: list[Tensor], values: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Leave the other channels out; see rounds.shrink."""
        spots = [
            self.layers[name].narrow(living, value) if name in self.layers else living
            for name, living, value in zip(self.names, places, values, strict=True)
        ]
        return self.weights(), spots


def _maps_channels(module: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


class _Layer:
    """A layer of which only some channels are computed; the others are zero, and stay so."""

    def __init__(self, module: nn.Linear | nn.Conv2d) -> None:
        weight = module.weight
        self.module, self.shape = module, weight.shape
        self.order = sorted(range(weight.ndim), key=weight.stride, reverse=True)
        """Its dimensions as they lie in memory."""
        self.dimension = 1 if isinstance(module, nn.Conv2d) else -1
        self.outputs, self.inputs = (torch.arange(n, device=weight.device) for n in self.shape[:2])
        self.hooked = False

    def narrow(self, living: Tensor, values: Tensor) -> Tensor:
        """Leave out what no living weight reads or writes; return where those lie then.

        Args:
            living: positions in the whole weight as it lies in memory.
            values: what lies there.
        """
        weight, rows, columns = self.module.weight, self.order.index(0), self.order.index(1)
        alive = torch.zeros(self.shape.numel(), dtype=torch.bool, device=weight.device)
        alive = alive.index_fill_(0, living.long(), True)
        alive = alive.view([self.shape[dimension] for dimension in self.order])
        self.outputs, self.inputs = _marked(alive, rows), _marked(alive, columns)
        alive = alive.index_select(rows, self.outputs).index_select(columns, self.inputs)
        spots = nonzero(alive.flatten())
        narrow = weight.new_zeros(alive.numel()).index_copy_(0, spots, values)
        back = [self.order.index(dimension) for dimension in range(weight.ndim)]
        self.module.weight = nn.Parameter(narrow.view(alive.shape).permute(back))
        if not self.hooked:
            self.module.register_forward_pre_hook(self._select)
            self.module.register_forward_hook(self._spread)
            self.module.bias, self.hooked = None, True  # It is zero.
        return spots

    def _select(self, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (given[0].index_select(self.dimension, self.inputs),)

    def _spread(self, module: nn.Module, given: object, made: Tensor) -> Tensor:
        shape = list(made.shape)
        shape[self.dimension] = self.shape[0]
        return made.new_zeros(shape).index_copy(self.dimension, self.outputs, made)


def _marked(marks: Tensor, dimension: int) -> Tensor:
    """Return where along a dimension anything is marked; the first if nothing is."""
    others = tuple(each for each in range(marks.ndim) if each != dimension)
    places = nonzero(any_along(marks, others))
    return places if len(places) else places.new_zeros(1)


def _without_relu(linear: nn.Module) -> None:
    """Take out the ReLUs of a network in which nothing is negative."""
    for module in list(linear.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Identity())


def _simplify(linear: nn.Module) -> None:
    """Make ReLU6 and the like plain ReLUs, and take out batch norms that change nothing.

    What is clipped is not linear, and has no gradient. A batch norm at initialization, in eval
    mode, differs from the identity by its epsilon only, which is left out.
    """
    for module in list(linear.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, nn.Hardtanh):
                setattr(module, name, nn.ReLU())
    for module in list(linear.modules()):  # Then, as timm's norms hold what follows them as `act`.
        for name, child in list(module._modules.items()):
            if isinstance(child, nn.BatchNorm2d) and _is_unit(child):
                setattr(module, name, getattr(child, "act", nn.Identity()))


def _is_unit(norm: nn.BatchNorm2d) -> bool:
    factors = (norm.weight, norm.running_var)
    return all(factor is not None and bool((factor == 1).all()) for factor in factors)


def _channels_last(linear: nn.Module) -> None:
    """Lay out kernels with channels last, which is quicker on CPUs and tensor cores."""
    for parameter in linear.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
