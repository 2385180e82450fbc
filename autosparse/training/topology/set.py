"""SET: the survivors nearest to zero go, in proportion for both signs; random weights grow.

Paper: D. Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse
Connectivity inspired by Network Science (Nature Communications 2018), arXiv 1707.04780, Algorithm
1: "remove a fraction zeta of the smallest positive weights" and "of the largest negative weights",
then add as many at random.

Departures: every so many steps instead of every epoch, a fraction that falls with a cosine instead
of a constant one, new weights zero instead of random; zeros count as positive, and the counts of
both signs, in proportion to their numbers, are rounded so that the total is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autosparse.sparsity.masks import top
from autosparse.training.topology.growth import Layer


def stays(layer: Layer, count: int) -> Tensor:
    """Return which survivors stay, bool [kept]; `count` of them go."""
    negative = layer.values < 0
    fewer = int(negative.count_nonzero())
    gone_below = count * fewer // max(len(negative), 1)
    size = layer.values.abs()
    kept = torch.zeros_like(negative)
    for side, gone in ((negative, gone_below), (~negative, count - gone_below)):
        left = int(side.count_nonzero()) - gone
        kept |= top(size.masked_fill(~side, -torch.inf), left) & side
    return kept
