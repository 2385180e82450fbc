"""RigL: the smallest survivors go; weights grow where the gradient is largest.

Paper: U. Evci et al., Rigging the Lottery: Making All Tickets Winners (ICML 2020), arXiv
1911.11134, Algorithm 1.

Departures: at an update the paper exchanges weights instead of making a step. Here the step is made
first, and magnitudes are those after it (as in the code of In-Time Over-Parameterization, S. Liu et
al. 2021); the gradients are of the same batch, at the values before the step, and not clipped.
Layers that standardise their weight (NFNet) count the gradient of the kernel that is applied.
"""

from __future__ import annotations

from torch import Tensor

from autosparse.sparsity.masks import top
from autosparse.training.topology.growth import Layer


def stays(layer: Layer, count: int) -> Tensor:
    """Return which survivors stay, bool [kept]; `count` of them go."""
    return top(layer.values.abs(), len(layer.values) - count)
