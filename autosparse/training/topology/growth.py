"""Which weights a layer gains at an update: exact counts, ties by position.

As in RigL's Algorithm 1, a weight that is about to go may be chosen to grow again in the same
update. It then simply stays, with its value and its moments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from autosparse.sparsity.masks import top


@dataclass(frozen=True)
class Layer:
    """One layer at an update, after its optimizer step; everything is flat."""

    index: Tensor
    """Where the survivors are in the flattened weight, ascending, int64 [kept]."""
    values: Tensor
    """Of the survivors, [kept]."""
    size: int
    """Weights of the layer, pruned ones too."""
    gradient: Tensor | None = None
    """Sizes of the dense weight's, [size]: |mean over the batch of the step|, at the values before
    it."""


def fraction_at(step: int, fraction: float, end: float) -> float:
    """Return which share of the survivors is exchanged after step `step`: a cosine that ends at 0.

    f(t) = fraction / 2 * (1 + cos(pi * t / end)), RigL's f_decay (section 3 of the paper).
    """
    return fraction / 2 * (1 + math.cos(math.pi * min(step, end) / end))


def grow(layer: Layer, stays: Tensor, scores: Tensor, reach: Tensor | None = None) -> Tensor:
    """Return the new survivors' positions, ascending, int64 [kept]: as many as before.

    Args:
        layer: before the exchange.
        stays: bool [kept], which survivors stay.
        scores: [size], finite, and overwritten; the highest grow, among all that do not stay.
        reach: bool [size], where weights may grow. If there are too few such places, the largest of
            those that were to go stay.
    """
    staying = layer.index[stays]
    scores[staying] = -torch.inf
    free = layer.size - len(staying)
    if reach is not None:
        scores.masked_fill_(~reach, -torch.inf)
        free = int((scores > -torch.inf).count_nonzero())
    wanted = len(layer.index) - len(staying)
    possible = min(wanted, free)
    chosen = top(scores, possible)
    chosen[staying] = True
    if possible < wanted:
        going = ~stays & ~chosen[layer.index]
        size = layer.values.abs().masked_fill(~going, -torch.inf)
        chosen[layer.index[top(size, wanted - possible) & going]] = True
    return chosen.nonzero().squeeze(1)


def sources(before: Tensor, after: Tensor) -> Tensor:
    """Return, for each new survivor, its place among the old ones, or -1 if it is new; int64.

    Args:
        before: positions of the old survivors, ascending.
        after: of the new ones.
    """
    if not len(before):
        return after.new_full(after.shape, -1)
    places = torch.searchsorted(before, after).clamp_(max=len(before) - 1)
    return torch.where(before[places] == after, places, -1)


def rearranged(values: Tensor, source: Tensor) -> Tensor:
    """Return what belongs to the new survivors: old ones keep it, new ones begin at zero."""
    return values.index_select(0, source.clamp(min=0)).masked_fill(source < 0, 0)
