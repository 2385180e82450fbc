"""Pruning in rounds: what iterative criteria share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from autosparse import masks
from autosparse.config import keep_count
from autosparse.errors import UsageError

Scores = dict[str, Tensor]
Take = Callable[[int, Tensor], None]
Gradient = Callable[[Take], None]
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
        gradient: called with `take`; it calls take(place, gradient) for each of the weights as
            they are now (place: in their order; one that is left out counts as zero). Each may
            be handed over as soon as it is there, and is used up.
        sparsity: fraction to remove in the end.
        rounds: n, over which the density falls exponentially.
        min_per_layer: every layer keeps its best so many in every round.

    Returns the last round's scores; a weight that fell in round k has k - n - 1 (below zero, the
    earlier the lower).
    """
    left = _Left(weights)
    for number, count in enumerate(counts(len(left.alive), sparsity, rounds), start=1):
        left.forget_the_dead()
        left.score(gradient)
        left.remove(left.worst(count, min_per_layer), number)
    return {name: left.restored(place, rounds) for place, name in enumerate(weights)}


class _Left:
    """Which weights are left. Layers lie end to end, each in the order it lies in in memory."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = list(weights.values())
        for name, weight in weights.items():
            if not _lie_alike(weight, torch.empty_like(weight)):
                raise UsageError(f"{name} lies in memory with gaps; clone it first")
        self.fell = [
            torch.zeros(weight.numel(), dtype=torch.int16, device=weight.device)
            for weight in self.weights
        ]
        """In which round; 0: not yet."""
        self.places: list[Tensor] = []
        """Where in the layers the entries lie that are still looked at; empty: all are."""
        self.values: list[Tensor] = []
        """The weights there."""
        self._lay_out([weight.numel() for weight in self.weights])

    def _lay_out(self, sizes: list[int]) -> None:
        device = self.weights[0].device
        self.sizes = sizes
        self.per_layer = torch.tensor(sizes, device=device)
        self.ends = self.per_layer.cumsum(0)
        self.alive = torch.ones(sum(sizes), dtype=torch.bool, device=device)
        self.low = torch.empty_like(self.alive)
        self.scores = [
            torch.zeros(size, dtype=_float_of(weight), device=device)
            for weight, size in zip(self.weights, sizes, strict=True)
        ]
        """|weight * gradient| of every layer, 1-D; one block of memory, as fresh ones are slow."""

    def forget_the_dead(self) -> None:
        """Look only at what is alive from now on, once three of four are dead."""
        if 2 * int(self.per_layer.sum()) > len(self.alive):
            return
        alive = [_nonzero(part) for part in self.alive.split(self.sizes)]
        if self.places:
            alive = [all_[mine] for all_, mine in zip(self.places, alive, strict=True)]
        self.places = [mine.int() for mine in alive]
        self.values = [
            flattened(weight).index_select(0, mine)
            for weight, mine in zip(self.weights, self.places, strict=True)
        ]
        self._lay_out([len(mine) for mine in self.places])

    def score(self, gradient: Gradient) -> None:
        """Set the scores to |weight * gradient|."""
        missing = set(range(len(self.weights)))

        def take(place: int, found: Tensor) -> None:
            missing.discard(place)
            flat = flattened(found, self.weights[place])
            score = self.scores[place] = self.scores[place].to(flat.dtype)
            if self.places:
                torch.index_select(flat, 0, self.places[place], out=score)
                score.mul_(self.values[place])
            else:
                torch.mul(flat, flattened(self.weights[place]), out=score)
            score.abs_()

        gradient(take)
        for place in missing:
            self.scores[place].zero_()

    def worst(self, count: int, min_per_layer: int) -> Tensor:
        """Return the places of those alive that must go for `count` to stay, ascending.

        Of equal ones the last go. A guess says below which score they lie, so that only those
        are looked at closely; a wrong guess costs time only.
        """
        left = int(self.per_layer.sum())
        excess = left - count
        bound = self._guess(excess / left)
        for layer, low in zip(self.scores, self.low.split(self.sizes), strict=True):
            _up_to(layer, bound, low)
        places = _nonzero(self.low.logical_and_(self.alive))
        if len(places) < excess:
            places = _nonzero(self.alive)
        near = places.split(self._count(places).tolist())
        values = torch.cat([
            layer.index_select(0, mine - start)
            for layer, mine, start in zip(self.scores, near, self._starts(), strict=True)
        ])  # fmt: skip
        lost = places[_lowest(values, excess)]
        if count < min_per_layer * len(self.weights):
            raise UsageError(
                f"{count} weights are too few for {len(self.weights)} layers of at "
                f"least {min_per_layer} each; lower the sparsity or set min_per_layer to 0"
            )
        if min_per_layer and int((self.per_layer - self._count(lost)).min()) < min_per_layer:
            flat = torch.cat(self.scores).masked_fill_(~self.alive, -1)
            chosen = masks.top_guarded(flat, self.sizes, count, min_per_layer)
            lost = _nonzero(chosen.logical_not_().logical_and_(self.alive))
        return lost

    def remove(self, lost: Tensor, number: int) -> None:
        """Set to zero what is at these places."""
        gone = self._count(lost)
        rows = zip(self.weights, lost.split(gone.tolist()), self._starts(), strict=True)
        for place, (weight, mine, start) in enumerate(rows):
            mine = mine - start
            if self.places:
                self.values[place].index_fill_(0, mine, 0)
                mine = self.places[place][mine].long()
            flattened(weight).index_fill_(0, mine, 0)
            self.fell[place].index_fill_(0, mine, number)
        self.alive.index_fill_(0, lost, False)
        self.per_layer -= gone

    def restored(self, place: int, rounds: int) -> Tensor:
        """Return one layer's scores in its shape: the last ones, used up, or when a weight fell."""
        last, self.scores[place] = self.scores[place], torch.empty(0)
        fell = self.fell[place]
        scores = fell.to(last.dtype) - (rounds + 1)
        if self.places:
            mine = self.places[place].long()
            scores[mine] = torch.where(fell[mine] == 0, last, scores[mine])
        else:
            scores = torch.where(fell == 0, last, scores)
        return _in_shape(scores, self.weights[place])

    def _guess(self, share: float) -> float:
        """Return a score below which surely about `share` of those alive lie."""
        if len(self.alive) < 1000 * STEP:
            return float("inf")
        starts = [-start % STEP for start in self._starts()]
        pairs = zip(self.scores, starts, strict=True)
        sample = torch.cat([layer[first::STEP] for layer, first in pairs])
        sample = sample[self.alive[::STEP]]
        if not len(sample):
            return float("inf")
        margin = 4 * (share * (1 - share) / len(sample)) ** 0.5 + 2 / len(sample)
        return float(sample.float().quantile(min(share + margin, 1.0)))

    def _count(self, places: Tensor) -> Tensor:
        """Return how many of the (ascending) places lie in each layer."""
        cuts = torch.searchsorted(places, self.ends)
        return cuts.diff(prepend=cuts.new_zeros(1))

    def _starts(self) -> list[int]:
        return [0, *self.ends[:-1].tolist()]


def _float_of(weight: Tensor) -> torch.dtype:
    return weight.dtype if weight.is_floating_point() else torch.get_default_dtype()


def _numpy_is_quicker(values: Tensor) -> bool:
    """Whether torch's own comparison and selection take twice as long."""
    return values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64)


def _up_to(values: Tensor, bound: float, out: Tensor) -> None:
    """Write into `out` which values are not above the bound."""
    if _numpy_is_quicker(values):
        np.less_equal(values.numpy(), bound, out=out.numpy())
    else:
        torch.le(values, bound, out=out)


def _lowest(values: Tensor, count: int) -> Tensor:
    """Return which are the `count` lowest; of equal ones the last."""
    if not count or not _numpy_is_quicker(values):
        return masks.top(values, len(values) - count).logical_not_()
    array = values.numpy()
    bound = np.partition(array, count - 1)[count - 1]
    chosen = array < bound
    ties = np.flatnonzero(array == bound)
    chosen[ties[len(ties) - (count - int(np.count_nonzero(chosen))) :]] = True
    return torch.from_numpy(chosen)


def _nonzero(marks: Tensor) -> Tensor:
    """Return the places of the True; NumPy is quicker than torch on a CPU."""
    if marks.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(marks.numpy()))
    return marks.nonzero().squeeze(1)


def flattened(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Flatten in the order in which `like` lies in memory; a view if the tensor lies so too."""
    like = tensor if like is None else like
    tensor = tensor.detach()
    if not _lie_alike(tensor, like):
        tensor = torch.empty_like(like, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def _lie_alike(tensor: Tensor, other: Tensor) -> bool:
    rows = zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
    return all(mine == theirs for size, mine, theirs in rows if size > 1)


def _in_shape(flat: Tensor, like: Tensor) -> Tensor:
    """Undo `flattened`."""
    return flat.as_strided(like.shape, like.stride()).contiguous()
