"""SparseOpt: gradients of a neuron's weights are scaled by the density of its fan-in.

    g_i = sqrt(d_i / d) · dL/dθ_i

for the weights of neuron i (an output channel), d_i the share of its fan-in that survives, d the
mean of the layer. Batch norm makes gradients of neurons with few weights larger than those of
others; this undoes it, and leaves the layer's gradient about as long as it was.

Paper: M. Adnan et al., SparseOpt: Addressing Normalization-induced Gradient Skew in Sparse
Training, arXiv 2605.27541: D = diag(sqrt(1 − s_i)), step lr / sqrt(1 − s_avg) · D g.

Departures: the scaling comes before clipping and before the optimizer; the paper has SGD with
momentum in mind, and Adam's division by the gradient's size undoes it. Factors are worked out anew
when a topology exchanges weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from autosparse.sparsity.compact import CompactWeight, compact_weights, values_of


def sparseopt(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Have the gradients of a model's compact weights scaled.

    Args:
        optimizer: not used.
        model: compact; a weight that is whole has a factor of one, and is left alone.
    """
    seen: set[nn.Parameter] = set()
    for name, weight in compact_weights(model):
        values = values_of(model, name)
        if values not in seen and values.requires_grad:
            seen.add(values)
            values.register_hook(_scaling(weight))


def factors(weight: CompactWeight) -> Tensor:
    """Return sqrt(d_i / d) for every survivor, [kept]."""
    fan_in = math.prod(weight.shape[1:])
    neuron = weight.index.long() // fan_in
    survivors = neuron.bincount(minlength=weight.shape[0]).double()
    return (survivors / survivors.mean()).sqrt()[neuron]


def _scaling(weight: CompactWeight) -> Callable[[Tensor], Tensor]:
    known: dict[int, Tensor] = {}

    def scale(gradient: Tensor) -> Tensor:
        version = weight.index._version  # Exchanges raise it.
        if version not in known:
            known.clear()
            known[version] = factors(weight).to(gradient)
        return gradient * known[version]

    return scale
