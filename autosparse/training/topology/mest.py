"""MEST: survivors whose magnitude and gradient are both small go; random weights grow.

Paper: G. Yuan et al., MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge
(NeurIPS 2021), arXiv 2110.14032: a weight is worth |w| + |lambda * dL/dw| (Elastic Mutation).

Departures: the paper's value of lambda is not known to us; ours is 1
(`training.topology_gradient_weight`). Fraction and frequency follow RigL's schedule instead of
steps, and the soft memory bound (EM&S: first more weights, then fewer) is left out, as counts are
fixed here. The gradient is taken from the dense one, which the paper does without.
"""

from __future__ import annotations

from torch import Tensor

from autosparse.sparsity.masks import top
from autosparse.training.topology.growth import Layer


def stays(layer: Layer, count: int, gradient_weight: float = 1.0) -> Tensor:
    """Return which survivors stay, bool [kept]; `count` of them go."""
    assert layer.gradient is not None
    worth = layer.values.abs() + gradient_weight * layer.gradient[layer.index]
    return top(worth, len(layer.values) - count)
