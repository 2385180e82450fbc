"""Pruning in rounds, as iterative criteria do, at little more than the cost of their passes.

A plain top-k over all weights takes several times a pass of resnet50 at 64 px in every round, on
one core. So pruned weights are dropped from all arrays once most are gone, and a sample of the
scores says about where a round's threshold lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from autosparse.core.errors import UsageError
from autosparse.models.gradients import settle
from autosparse.sparsity import masks
from autosparse.sparsity.counts import keep_count
from autosparse.sparsity.masks import nonzero

Scores = dict[str, Tensor]
Take = Callable[[int, Tensor], None]
Gradient = Callable[[Take], int | None]
Narrow = Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]
STEP = 997
"""One weight in this many is in the sample that estimates a round's threshold; a prime, so that
the sample does not fall into the same column of every row."""
FIRST, LATER = 0.25, 0.5
"""Pruned weights are dropped from the arrays once only this share is alive: at first, and again.
Set by hand."""
CHUNK = 1 << 18
"""Scores that a thread works on at a time: 1 MB in float32, which stays in its core's cache."""


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
    shared: bool = False,
    passes: float = 1.0,
    narrow: Narrow | None = None,
    lasting: bool = False,
) -> Scores:
    """Prune by |weight * gradient| in rounds; what is pruned is zero and stays so.

    Args:
        weights: what `gradient` is taken by, a tensor per prunable parameter; set to zero in place.
        gradient: called with `take`; it calls take(place, gradient) for each of the weights as
            they are now (place: in their order; one that is left out counts as zero). Each is
            passed as soon as it is computed, and may be overwritten; gradients of the same place
            are added up. Returns how many samples they are a sum over, or None.
        sparsity: fraction to remove in the end.
        rounds: n, over which the density falls exponentially.
        min_per_layer: how many weights every layer keeps in every round, its best.
        shared: whether gradients are added up over the ranks.
        passes: forward-backward passes per sample.
        narrow: called when pruned weights are dropped, with the positions of the living in each of
            the weights (flattened in memory order, ascending) and their values. Returns the tensors
            that `gradient` is taken by from then on, and where the living lie in these.
        lasting: a layer whose scores are all zero in a round goes by its last ones that were not,
            below all other layers; if no layer has any other, all go by their last ones.

    Returns the last round's scores; a weight that fell in round k has k - n - 1 (below zero, the
    earlier the lower).
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        left = _Left(weights, rounds, pool, lasting)
        for number, count in enumerate(counts(len(left.alive), sparsity, rounds), start=1):
            left.drop_pruned(narrow)
            samples = left.score(gradient)
            if samples is not None:
                left.scores.div_(settle([left.scores], samples, shared, passes))
            left.remove(left.worst(count, min_per_layer), number)
        return {name: left.restored(place, rounds) for place, name in enumerate(weights)}


class _Left:
    """Which weights are alive. Layers lie end to end, each in its memory order.

    Apart from the weights and one block of scores it holds two bytes a weight.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], rounds: int, pool: ThreadPoolExecutor, lasting: bool
    ) -> None:
        self.weights, self.pool, self.lasting = list(weights.values()), pool, lasting
        for name, weight in weights.items():
            if not _lie_alike(weight, torch.empty_like(weight)):
                raise UsageError(f"{name} lies in memory with gaps; clone it first")
        self.all_sizes = [weight.numel() for weight in self.weights]
        self.layouts = [(weight.shape, weight.stride()) for weight in self.weights]
        kind = torch.uint8 if rounds < 256 else torch.int16
        self.fell = torch.zeros(sum(self.all_sizes), dtype=kind, device=self.weights[0].device)
        """In which round each weight fell; 0: not yet."""
        self.places: Tensor | None = None
        """Where in its layer each entry lies that is not dropped; None if none is."""
        self.spots = self.places
        """Where it lies in the tensor that `narrow` put in the layer's place."""
        self.values = self.fell[:0]
        """The weights there."""
        self.ever_short: list[int] = []
        """Layers that would have kept too few weights in some round: their best are spared."""
        self._lay_out(self.all_sizes)

    def _lay_out(self, sizes: list[int]) -> None:
        device = self.fell.device
        self.sizes, self.per_layer = sizes, torch.tensor(sizes, device=device)
        """How many entries of each layer were not dropped, and how many of those are alive."""
        self.ends = self.per_layer.cumsum(0)
        self.alive = torch.ones(sum(sizes), dtype=torch.bool, device=device)
        kept = torch.zeros(sum(sizes), dtype=_float_of(self.weights[0]), device=device)
        self._keep_scores(kept)

    def _keep_scores(self, scores: Tensor) -> None:
        """Write every round's scores into this block: fresh memory would be slow."""
        self.scores, self.layers = scores, scores.split(self.sizes)

    def drop_pruned(self, narrow: Narrow | None) -> None:
        """Drop pruned weights from all arrays, once few enough are alive."""
        most = FIRST if self.places is None else LATER
        if int(self.per_layer.sum()) > most * len(self.alive):
            return
        sizes, alive = self.per_layer.tolist(), nonzero(self.alive)
        before = self.scores[alive] if self.lasting else None
        if self.places is None:
            self.places = self._inside(alive)
            self.values = torch.cat([
                flattened(weight).index_select(0, mine)
                for weight, mine in zip(self.weights, self.places.split(sizes), strict=True)
            ])  # fmt: skip
        else:
            self.places, self.values = self.places[alive], self.values[alive]
        self._lay_out(sizes)
        if before is not None:
            self._keep_scores(before)
        self.spots = self.places
        if narrow is not None:
            self.weights, spots = narrow(
                list(self.places.split(sizes)), list(self.values.split(sizes))
            )
            self.spots = torch.cat(spots)

    def score(self, gradient: Gradient) -> int | None:
        """Set the scores to weight * gradient, whose signs do not matter; return the samples."""
        missing = set(range(len(self.weights)))
        places = None if self.spots is None else self.spots.split(self.sizes)
        values = self.values.split(self.sizes) if places is not None else self.weights

        def take(place: int, slope: Tensor) -> None:
            flat = flattened(slope, self.weights[place])
            if flat.dtype != self.scores.dtype:
                wide = torch.promote_types(flat.dtype, self.scores.dtype)
                flat = flat.to(wide)
                self._keep_scores(self.scores.to(wide))
            layer, weight = self.layers[place], flattened(values[place])
            mine = None if places is None else places[place]
            if self.lasting and not _tells(flat, weight, mine):
                return
            if place not in missing:
                flat = flat if places is None else flat.index_select(0, places[place])
                layer.add_(flat.mul_(weight))
            elif places is None:
                torch.mul(flat, weight, out=layer)
            else:
                torch.index_select(flat, 0, places[place], out=layer).mul_(weight)
            missing.discard(place)

        samples = gradient(take)
        if not self.lasting:
            for place in missing:
                self.layers[place].zero_()
        elif len(missing) < len(self.weights):
            for place, alive in enumerate(self.alive.split(self.sizes)):
                if place in missing:
                    _rank_below_all(self.layers[place], alive)
        return samples

    def worst(self, count: int, min_per_layer: int) -> Tensor:
        """Return the places of the living weights to remove so that `count` stay, ascending.

        Of equal scores the last go. Only scores below an estimated bound are compared; if the
        estimate is too low, all are.
        """
        if count < min_per_layer * len(self.weights):
            raise UsageError(
                f"{count} weights are too few for {len(self.weights)} layers of at "
                f"least {min_per_layer} each; lower the sparsity or set min_per_layer to 0"
            )
        excess, spared = int(self.per_layer.sum()) - count, self.ends[:0]
        short = self.ever_short
        while True:
            best = self._best_of(short, min_per_layer)
            self.alive.index_fill_(0, best, False)  # So it is not found among the lowest.
            spared = torch.cat([spared, best])
            lost = self._lowest_of_all(excess)
            short = self._short(lost, min_per_layer)
            if not short:
                self.alive.index_fill_(0, spared, True)
                return lost
            self.ever_short = self.ever_short + short

    def _short(self, lost: Tensor, least: int) -> list[int]:
        """Return the layers that would keep fewer than `least` weights without those lost."""
        left = self.per_layer - self._count(lost)
        return nonzero((left < least).logical_and_(left < self.per_layer)).tolist()

    def _lowest_of_all(self, excess: int) -> Tensor:
        near, values = self._up_to(self._guess(excess / max(int(self.per_layer.sum()), 1)))
        if len(near) < excess:
            near = nonzero(self.alive)
            values = self.scores[near].abs_()
        return near[_lowest(values, excess)]

    def _best_of(self, layers: list[int], count: int) -> Tensor:
        """Return the places of the `count` best of those alive in each of these layers."""
        best, alive = [self.ends[:0]], self.alive.split(self.sizes)
        for each in layers:
            there = nonzero(alive[each])
            sizes = self.layers[each].index_select(0, there).abs_()
            start = int(self.ends[each]) - self.sizes[each]
            best.append(there[masks.top(sizes, count)] + start)
        return torch.cat(best)

    def remove(self, lost: Tensor, number: int) -> None:
        """Set the weights at these places to zero."""
        gone = self._count(lost)
        self.alive.index_fill_(0, lost, False)
        self.per_layer -= gone
        if self.places is None or self.spots is None:
            spots = inside = self._inside(lost).long()
        else:
            self.values.index_fill_(0, lost, 0)
            inside = self.places.index_select(0, lost).long()
            spots = self.spots.index_select(0, lost).long()
        for weight, mine in zip(self.weights, spots.split(gone.tolist()), strict=True):
            if len(mine):
                flattened(weight).index_fill_(0, mine, 0)
        whole = torch.tensor(self.all_sizes, device=lost.device)
        starts = (whole.cumsum(0) - whole).repeat_interleave(gone)
        self.fell.index_fill_(0, inside.add_(starts), number)

    def restored(self, place: int, rounds: int) -> Tensor:
        """Return one layer's scores in its shape: the last ones, or when a weight fell.

        The memory of the last scores is used again, unless weights were dropped.
        """
        last, fell = self.layers[place].abs_(), self.fell.split(self.all_sizes)[place]
        out = last
        if self.places is not None:
            mine = self.places.split(self.sizes)[place].long()
            last = out = last.new_zeros(len(fell)).index_copy_(0, mine, last)
        scores = torch.where(fell == 0, last, fell.to(last.dtype) - (rounds + 1))
        shape, stride = self.layouts[place]
        return out.view(shape).copy_(scores.as_strided(shape, stride))

    def _guess(self, share: float) -> float:
        """Estimate a score that at least `share` of the living lie below (by four sigma)."""
        if len(self.alive) < 1000 * STEP:
            return float("inf")
        sample = self.scores[::STEP].abs()[self.alive[::STEP]]
        if not len(sample):
            return float("inf")
        margin = 4 * (share * (1 - share) / len(sample)) ** 0.5 + 2 / len(sample)
        return float(sample.float().quantile(min(share + margin, 1.0)))

    def _up_to(self, bound: float) -> tuple[Tensor, Tensor]:
        """Return the places of those alive whose |score| is not above the bound, and |score|."""
        if not _numpy_is_quicker(self.scores):
            places = nonzero((self.scores.abs() <= bound).logical_and_(self.alive))
            return places, self.scores[places].abs_()
        scores, alive = self.scores.numpy(), self.alive.numpy()

        def look(start: int) -> tuple[np.ndarray, np.ndarray]:
            """Only NumPy: torch would start more threads for this one, and the cores are taken."""
            part = slice(start, start + CHUNK)
            sizes = np.abs(scores[part])
            low = sizes <= bound
            np.logical_and(low, alive[part], out=low)
            places = np.flatnonzero(low)
            return places + start, sizes[places]

        places, values = zip(*self.pool.map(look, range(0, len(scores), CHUNK)), strict=True)
        return torch.from_numpy(np.concatenate(places)), torch.from_numpy(np.concatenate(values))

    def _count(self, places: Tensor) -> Tensor:
        """Return how many of the (ascending) places lie in each layer."""
        cuts = torch.searchsorted(places, self.ends)
        return cuts.diff(prepend=cuts.new_zeros(1))

    def _inside(self, places: Tensor) -> Tensor:
        """Return where in their layers the (ascending) places lie, int32 if that is enough."""
        wide = max(self.all_sizes) > torch.iinfo(torch.int32).max
        inside = torch.empty_like(places, dtype=torch.int64 if wide else torch.int32)
        counts = self._count(places).tolist()
        starts = [0, *self.ends[:-1].tolist()]
        for mine, start, out in zip(
            places.split(counts), starts, inside.split(counts), strict=True
        ):
            torch.sub(mine, start, out=out)
        return inside


def _tells(gradient: Tensor, weight: Tensor, places: Tensor | None) -> bool:
    """Whether weight * gradient is anywhere other than zero.

    Args:
        gradient: [n], of the layer.
        weight: [m], those that are looked at.
        places: [m], where these lie in the layer; None: n = m.
    """
    for step in (STEP, 1):  # A sample is enough, except for a dead layer.
        some = slice(None, None, step)
        mine = gradient[some] if places is None else gradient.index_select(0, places[some])
        if bool((mine * weight[some]).any()):
            return True
    return False


def _rank_below_all(scores: Tensor, alive: Tensor) -> None:
    """Replace scores by their order, in numbers smaller than any score that is not zero.

    Zeros stay. Of equal ones the last are the lowest.
    """
    there = nonzero(alive & (scores != 0))
    best_first = scores[there].abs().sort(descending=True, stable=True).indices
    limits = torch.finfo(scores.dtype)
    ranks = torch.arange(len(there), 0, -1, dtype=scores.dtype, device=scores.device)
    scores.zero_()
    scores[there[best_first]] = ranks * (limits.smallest_normal * limits.eps)


def _float_of(weight: Tensor) -> torch.dtype:
    return weight.dtype if weight.is_floating_point() else torch.get_default_dtype()


def _numpy_is_quicker(values: Tensor) -> bool:
    """Whether NumPy compares and selects such values in about half of torch's time."""
    return values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64)


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


def any_along(marks: Tensor, dimensions: tuple[int, ...]) -> Tensor:
    """Return whether anything is marked along some dimensions; NumPy is quicker on a CPU."""
    if marks.device.type == "cpu":
        return torch.from_numpy(marks.numpy().any(dimensions))
    return marks.any(dimensions)


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
