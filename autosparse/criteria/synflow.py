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

Deep networks overflow in float32. Where the copy turns out to be linear from block to block, the
signal is divided by a power of two after every block: all paths run through those points, so
every score is scaled alike. Elsewhere everything is computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autosparse.criteria import Scores, register
from autosparse.gradients import backward_one_by_one, spend
from autosparse.paths import image_shape, rescale_between_blocks, without_shifts
from autosparse.rounds import Take, shrink


@register("synflow", needs_data=False)
def synflow(model, parameters, batches, loss_fn, *, sparsity: float, rounds: int = 100) -> Scores:
    """Return the synaptic flow of the last round; weights that fell in round k score k - n - 1.

    The flow is right up to a power of two, common to all weights.

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
    if rescale_between_blocks(linear, ones):
        _without_relu(linear)
    else:
        linear, ones = linear.double(), ones.double()

    def gradient(take: Take) -> None:
        spend(len(ones))
        backward_one_by_one(linear(ones).sum(), list(weights.values()), take)

    return shrink(weights, gradient, sparsity, rounds, min_per_layer=0)


def _without_relu(linear: nn.Module) -> None:
    """Take out the ReLUs of a network in which nothing is negative."""
    for module in list(linear.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Identity())


def _simplify(linear: nn.Module) -> None:
    """Make ReLU6 and the like plain ReLUs, and take out batch norms that change nothing.

    What is clipped is not linear, and has no gradient. A batch norm at initialization, in eval
    mode, differs from the identity by its epsilon only, which is left out.
    """
    for module in list(linear.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Hardtanh):
                setattr(module, name, nn.ReLU())
            elif isinstance(child, nn.BatchNorm2d) and _is_unit(child):
                setattr(module, name, getattr(child, "act", nn.Identity()))


def _is_unit(norm: nn.BatchNorm2d) -> bool:
    factors = (norm.weight, norm.running_var)
    return all(factor is not None and bool((factor == 1).all()) for factor in factors)


def _channels_last(linear: nn.Module) -> None:
    """Lay kernels out as CPUs (and tensor cores) like them."""
    for parameter in linear.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
