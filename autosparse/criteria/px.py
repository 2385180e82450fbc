"""Path eXclusion (PX): keep the paths that the data take, by the trace of their tangent kernel.

Paper: L. Iurada, M. Ciccone, T. Tommasi, Finding Lottery Tickets in Vision Models via
Data-driven Spectral Foresight Pruning (CVPR 2024), arXiv 2406.01820. Two sums over paths bound
the trace of the tangent kernel: z1, the network with all weights one, fed with squared pixels,
each unit open where the real network's pre-activation is above zero; and z2, the network with
squared weights and all units open, fed with ones. R = sum of z1 * z2 over samples and outputs;
score = θ^2 * dR/d(θ^2), with z1 held fixed; over n rounds (100) the density falls as final^(k/n).

The authors' published versions differ in how they treat batch norm and inputs; this follows the
formula above, with the trace's squared inputs. Departures: norms are left out of both sums (at
initialization they only rescale), pooling takes means, and gates such as those of
squeeze-and-excitation stay as they are; attention is no sum over paths, and there the score is
what the formula gives. Only activations that are modules close units; one that is a function
(F.relu) leaves all open, and a warning says so where a model has no such module at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from autosparse.criteria.base import Scores, register
from autosparse.criteria.rounds import Take, shrink
from autosparse.models.contract import outputs_of
from autosparse.models.gradients import Network, backward_one_by_one, mean_of, spend, with_weights
from autosparse.sparsity.paths import (
    Rescaling,
    activation_patterns,
    image_shape,
    only_paths,
    rescale_between_blocks,
    without_shifts,
)


@register("px", needs_data=True)
def px(
    model,
    parameters,
    batches,
    loss_fn,
    *,
    sparsity: float,
    rounds: int = 100,
    min_per_layer: int = 1,
) -> Scores:
    """Return the score of the last round; weights that fell in round k score k - n - 1.

    Args:
        sparsity: fraction of weights to remove in the end.
        rounds: n, over which the density falls exponentially.
        min_per_layer: how many weights every layer keeps in every round; 0 as published.
    """
    network = without_shifts(model, parameters)
    gates = only_paths(network)
    if not gates and len(parameters) > 1:
        warnings.warn(
            f"px finds no activation among the modules of {type(model).__name__}, so every unit "
            "counts as open; use modules such as nn.ReLU in place of functions",
            stacklevel=2,
        )
    squares = {name: network.get_parameter(name) for name in parameters}
    _raise_to(2, squares, parameters)
    like = next(iter(squares.values()))
    ones = torch.ones((1, *image_shape(model, batches)), dtype=like.dtype, device=like.device)
    rescaling = rescale_between_blocks(network, ones)
    if rescaling is None:
        network, ones = network.double(), ones.double()

    def gradient(take: Take) -> None:
        outputs = open_paths(model, network, parameters, squares, batches, gates, rescaling, ones)
        spend(len(ones))
        backward_one_by_one(
            (outputs_of(network, ones) * outputs).sum(), list(squares.values()), take
        )

    return shrink(squares, gradient, sparsity, rounds, min_per_layer=min_per_layer)


def open_paths(model, network, parameters, squares, batches, gates, rescaling, ones) -> Tensor:
    """Return z1, its mean over all samples, [1, classes], up to a common factor.

    Meanwhile the squares hold other powers of the weights, so that no further copy is needed.
    """
    _raise_to(0, squares, parameters)
    outputs, reference = _scaled(rescaling, network, ones)

    def part(images: Tensor, labels: Tensor) -> list[Tensor]:
        _raise_to(1, squares, parameters)
        patterns = _patterns(model, parameters, squares, gates, images)
        _raise_to(0, squares, parameters)
        for name, gate in gates.items():
            gate.patterns = patterns[name]
        sums, power = _scaled(rescaling, network, images.to(ones.dtype).square())
        for gate in gates.values():
            gate.patterns = None
        return [sums.double().mean(0, keepdim=True) * 2.0 ** (power - reference)]

    like = {"z1": torch.zeros_like(outputs, dtype=torch.float64)}
    mean = mean_of(batches, part, like, passes=2 / 3)["z1"]
    _raise_to(2, squares, parameters)
    return (mean / mean.abs().amax().clamp(min=1e-300)).to(ones.dtype)


@torch.no_grad()
def _raise_to(power: int, squares: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Set every entry that is not zero to that power of its parameter, in place."""
    for name, each in squares.items():
        each.copy_(each != 0)
        for _ in range(power):
            each.mul_(parameters[name])


def _scaled(rescaling: Rescaling | None, network: Network, images: Tensor) -> tuple[Tensor, int]:
    """Return the outputs, and the log2 of what they were divided by on the way."""
    if rescaling is not None:
        rescaling.log2 = 0
    with torch.no_grad():
        outputs = outputs_of(network, images)
    return outputs, 0 if rescaling is None else rescaling.log2


def _patterns(model, parameters, squares, gates, images) -> dict[str, list[Tensor]]:
    """Return where the real network's units are open, under the present masks."""
    masked = {name: squares[name].to(each.dtype) for name, each in parameters.items()}

    def run() -> None:
        with torch.no_grad():
            with_weights(model, masked)(images)

    return activation_patterns(model, gates, run)
