"""Pruning in rounds: what iterative criteria share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from autosparse import masks
from autosparse.config import keep_count
from autosparse.errors import UsageError

Scores = dict[str, Tensor]
Gradient = Callable[[], Sequence[Tensor | None]]
STEP = 997
"""Every so-manieth weight is looked at first to guess a round's threshold."""


def counts(total: int, sparsity: float, rounds: int) -> Iterator[int]:
    """Yield how many of `total` weights each round keeps: density final^(k/n), the last exact."""
    if rounds < 1:
        raise UsageError(f"rounds must be at least 1, got {rounds}")
    for number in range(1, rounds):
        yield keep_count(total, 1 - (1 - sparsity) ** (number / rounds))
    yield keep_count(total, sparsity)


def shrink(
    weights: Mapping[str, Tensor],
    gradient: Gradient,
    sparsity: float,
    rounds: int,
    *,
    min_per_layer: int = 1,
) -> Scores:
    """Prune by |weight * gradient| again and again; what is pruned is zero and stays so.

    Args:
        weights: what `gradient` is taken by, a tensor per prunable parameter; set to zero in place.
        gradient: () -> a gradient of the same shape for each of the weights as they are now, in
            their order (None: zero). They are used up.
        sparsity: fraction to remove in the end.
        rounds: n, over which the density falls exponentially.
        min_per_layer: every layer keeps its best so many in every round.

    Returns the last round's scores; a weight that fell in round k has k - n - 1 (below zero, the
    earlier the lower).
    """
    left = _Left(weights)
    layers: list[Tensor] = []
    for number, count in enumerate(counts(len(left.alive), sparsity, rounds), start=1):
        layers = left.scores(gradient())
        left.remove(left.worst(layers, count, min_per_layer), number)
    scores = {}
    rows = zip(weights.items(), layers, left.fell.split(left.sizes), strict=True)
    for (name, weight), layer, fell in rows:
        flat = torch.where(fell == 0, layer, fell.to(layer.dtype) - (rounds + 1))
        scores[name] = _in_shape(flat, weight)
    return scores


class _Left:
    """Which weights are left. Layers lie end to end, each in the order it lies in in memory."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = list(weights.values())
        self.sizes = [weight.numel() for weight in self.weights]
        total, device = sum(self.sizes), self.weights[0].device
        self.ends = torch.tensor(self.sizes, device=device).cumsum(0)
        self.per_layer = torch.tensor(self.sizes, device=device)
        self.alive = torch.ones(total, dtype=torch.bool, device=device)
        self.low = torch.empty_like(self.alive)
        self.fell = torch.zeros(total, dtype=torch.int16, device=device)
        """In which round; 0: not yet."""

    def scores(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Return |weight * gradient| of every layer, 1-D, in the place of the gradients."""
        found = []
        for weight, gradient in zip(self.weights, gradients, strict=True):
            flat = flattened(weight)
            if gradient is None:
                found.append(torch.zeros_like(flat))
            else:
                found.append(flattened(gradient, weight).mul_(flat).abs_())
        return found

    def worst(self, layers: list[Tensor], count: int, min_per_layer: int) -> Tensor:
        """Return the places of those alive that must go for `count` to stay, ascending.

        Of equal ones the last go. A guess says below which score they lie, so that only those
        are looked at closely; a wrong guess costs time only.
        """
        left = int(self.per_layer.sum())
        excess = left - count
        bound = self._guess(layers, excess / left)
        for layer, low in zip(layers, self.low.split(self.sizes), strict=True):
            torch.le(layer, bound, out=low)
        places = _nonzero(self.low.logical_and_(self.alive))
        if len(places) < excess:
            places = _nonzero(self.alive)
        near = places.split(self._count(places).tolist())
        values = torch.cat([
            layer.index_select(0, mine - start)
            for layer, mine, start in zip(layers, near, self._starts(), strict=True)
        ])  # fmt: skip
        lost = places[masks.top(values, len(places) - excess).logical_not_()]
        if min_per_layer and int((self.per_layer - self._count(lost)).min()) < min_per_layer:
            flat = torch.cat(layers).masked_fill_(~self.alive, -1)
            chosen = masks.top_guarded(flat, self.sizes, count, min_per_layer)
            lost = _nonzero(chosen.logical_not_().logical_and_(self.alive))
        return lost

    def remove(self, lost: Tensor, number: int) -> None:
        """Set to zero what is at these places."""
        gone = self._count(lost)
        rows = zip(self.weights, lost.split(gone.tolist()), self._starts(), strict=True)
        for weight, mine, start in rows:
            flattened(weight).index_fill_(0, mine - start, 0)
        self.fell.index_fill_(0, lost, number)
        self.alive.index_fill_(0, lost, False)
        self.per_layer -= gone

    def _guess(self, layers: list[Tensor], share: float) -> float:
        """Return a score below which surely about `share` of those alive lie."""
        if len(self.alive) < 1000 * STEP:
            return float("inf")
        starts = [-start % STEP for start in self._starts()]
        pairs = zip(layers, starts, strict=True)
        sample = torch.cat([layer[first::STEP] for layer, first in pairs])
        sample = sample[self.alive[::STEP]]
        margin = 4 * (share * (1 - share) / len(sample)) ** 0.5 + 2 / len(sample)
        return float(sample.float().quantile(min(share + margin, 1.0)))

    def _count(self, places: Tensor) -> Tensor:
        """Return how many of the (ascending) places lie in each layer."""
        cuts = torch.searchsorted(places, self.ends)
        return cuts.diff(prepend=cuts.new_zeros(1))

    def _starts(self) -> list[int]:
        return [0, *self.ends[:-1].tolist()]


def _nonzero(marks: Tensor) -> Tensor:
    """Return the places of the True; NumPy is quicker than torch on a CPU."""
    if marks.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(marks.numpy()))
    return marks.nonzero().squeeze(1)


def _channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and not tensor.is_contiguous()


def flattened(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Flatten in the order in which `like` lies in memory (a view if the tensor lies so too)."""
    if _channels_last(tensor if like is None else like):
        return tensor.detach().permute(0, 2, 3, 1).reshape(-1)
    return tensor.detach().reshape(-1)


def _in_shape(flat: Tensor, like: Tensor) -> Tensor:
    """Undo `flattened`."""
    if not _channels_last(like):
        return flat.view(like.shape)
    out, inner, height, width = like.shape
    return flat.view(out, height, width, inner).permute(0, 3, 1, 2).contiguous()
