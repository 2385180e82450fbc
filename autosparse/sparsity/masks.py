"""From scores to masks: exact counts, ties broken by position, no layer emptied unasked."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autosparse.core.errors import UsageError, unknown
from autosparse.sparsity.counts import keep_count

Masks = dict[str, Tensor]
SCOPES = ("global", "layer")
MANY_TIES = 0.01
"""Warn if more ties than this share of the kept weights lie at the threshold; set by hand."""
SAMPLE = 1 << 14
"""Size of the sample of scores by which the threshold is estimated first; a power of two that costs
nothing next to millions of weights."""


def from_scores(scores: Mapping[str, Tensor], sparsity: float, **options: Any) -> Masks:
    """Remove the fraction `sparsity` (0 <= sparsity < 1) of all weights; `options`: see `keep`."""
    return keep(scores, keep_count(total(scores), sparsity), **options)


def keep(
    scores: Mapping[str, Tensor],
    count: int,
    *,
    scope: str = "global",
    min_per_layer: int = 1,
    per_channel: bool = False,
    within: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Keep exactly the `count` highest scores.

    Args:
        scores: a finite float tensor per prunable parameter; higher = keep. Equal scores are kept
            in the order of the parameters and of the positions inside them.
        count: how many weights to keep, over all layers.
        scope: `global` compares all weights; `layer` keeps the same density in every layer.
        min_per_layer: how many weights, its best, every layer keeps; 0 allows layer collapse.
        per_channel: every output channel (first dimension) keeps its best weight.
        within: masks that the result must lie inside (IRP: pruned weights stay pruned).
    """
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)
    _check_scores(scores)
    inside = kept(within) if within else total(scores)
    if count > inside:
        raise UsageError(f"{count} weights are to be kept, but only {inside} are left")
    if scope == "layer":
        least = least_of(scores, min_per_layer, per_channel, within)
        sizes = {name: score.numel() for name, score in scores.items()}
        most = {name: int(mask.sum()) for name, mask in within.items()} if within else None
        counts = allocate(dict.fromkeys(sizes, 1.0), sizes, count, least, most=most)
        return keep_counts(scores, counts, per_channel=per_channel, within=within)
    return _keep_global(scores, count, min_per_layer, per_channel, within)


def dense(weights: Mapping[str, Tensor], device: str | None = None) -> Masks:
    """Return masks that keep all of the weights, by default on the device of each."""
    return {
        name: torch.ones(each.shape, dtype=torch.bool, device=device or each.device)
        for name, each in weights.items()
    }


def total(scores: Mapping[str, Tensor]) -> int:
    """Return how many weights there are."""
    return sum(score.numel() for score in scores.values())


def counts(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how many weights of each layer are kept."""
    return {name: int(mask.count_nonzero()) for name, mask in masks.items()}


def least_of(
    scores: Mapping[str, Tensor],
    min_per_layer: int = 1,
    per_channel: bool = False,
    within: Mapping[str, Tensor] | None = None,
) -> dict[str, int]:
    """Return how many weights the guards keep in every layer; what is empty stays empty."""
    least = {}
    for name, score in scores.items():
        most, channels = score.numel(), score.shape[0] if score.ndim else 1
        if within is not None:
            most = int(within[name].count_nonzero())
            channels = int(within[name].flatten(1).any(1).count_nonzero()) if per_channel else 0
        least[name] = max(min(min_per_layer, most), channels if per_channel else 0)
    return least


def is_finite(tensor: Tensor) -> bool:
    """Return whether there is no NaN or infinity in a tensor."""
    lowest, highest = tensor.aminmax()
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))


def _check_scores(scores: Mapping[str, Tensor]) -> None:
    for name, score in scores.items():
        if not is_finite(score):
            raise UsageError(f"the scores of {name} are not finite; nothing was pruned")


def keep_counts(
    scores: Mapping[str, Tensor],
    counts: Mapping[str, int],
    *,
    per_channel: bool = False,
    within: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Keep exactly `counts[name]` of every layer, its highest scores."""
    return {
        name: top(_eligible(name, score, per_channel, within), counts[name]).view(score.shape)
        for name, score in scores.items()
    }


def _eligible(
    name: str, score: Tensor, per_channel: bool, within: Mapping[str, Tensor] | None
) -> Tensor:
    """Return a layer's scores, flat: -inf outside of `within`, inf for the best of each channel."""
    flat = score.detach().flatten()
    if within is not None:
        flat = flat.masked_fill(~within[name].flatten().to(flat.device), -torch.inf)
    if per_channel:
        flat = flat.clone()
        _raise_channels(flat.view(score.shape))
    return flat


def _keep_global(
    scores: Mapping[str, Tensor],
    count: int,
    min_per_layer: int,
    per_channel: bool,
    within: Mapping[str, Tensor] | None,
) -> Masks:
    guarded = sum(least_of(scores, min_per_layer, per_channel, within).values())
    if count < guarded:
        least = "one in every output channel" if per_channel else f"at least {min_per_layer} each"
        raise UsageError(
            f"{count} weights are too few for {len(scores)} layers of {least}; lower the sparsity"
        )
    layers = [_eligible(name, score, per_channel, within) for name, score in scores.items()]
    chosen = top_guarded(layers, count, min_per_layer)
    return {name: part.view(scores[name].shape) for name, part in zip(scores, chosen, strict=True)}


def top_guarded(layers: Sequence[Tensor], count: int, min_per_layer: int) -> list[Tensor]:
    """Mark the `count` highest of 1-D layers; each keeps its best `min_per_layer`, if it has them.

    If a layer would keep too few, the best of every layer are raised above all.
    """
    chosen = top_of(layers, count)
    least = [min(min_per_layer, len(layer)) for layer in layers]
    if all(int(now.count_nonzero()) >= few for now, few in zip(chosen, least, strict=True)):
        return chosen
    best = [top(layer, few) for layer, few in zip(layers, least, strict=True)]
    raised = [
        torch.where(first & (layer > -torch.inf), torch.inf, layer)
        for first, layer in zip(best, layers, strict=True)
    ]
    return top_of(raised, count)


def _raise_channels(scores: Tensor) -> None:
    """Set the best score of every output channel to infinity, in place, unless it is -infinity."""
    rows = scores.view(len(scores), -1)
    best = rows.max(1, keepdim=True)
    first = (rows == best.values).int().argmax(1, keepdim=True)
    rows.scatter_(1, first, torch.where(best.values > -torch.inf, torch.inf, -torch.inf))


def top(flat: Tensor, count: int) -> Tensor:
    """Return a bool tensor that marks the `count` highest of a 1-D tensor; ties: the first."""
    return top_of([flat], count)[0]


def top_of(layers: Sequence[Tensor], count: int) -> list[Tensor]:
    """Mark the `count` highest of all 1-D layers together; of equal ones the first."""
    size = sum(len(layer) for layer in layers)
    if count <= 0 or count >= size:
        return [torch.full_like(layer, count > 0, dtype=torch.bool) for layer in layers]
    return _top_of_few(layers, count, size) or _top_of_all(layers, count)


def _top_of_few(layers: Sequence[Tensor], count: int, size: int) -> list[Tensor] | None:
    """Do it among the values above a bound, if few of many are wanted, in half of the time."""
    if size <= 8 * SAMPLE or 8 * count > size:
        return None
    low, _ = bounds(layers, count)
    above = [layer >= low for layer in layers]
    if not count <= sum(int(each.count_nonzero()) for each in above) <= size // 4:
        return None  # The bound is a bad estimate, or many values equal it.
    places = [nonzero(each) for each in above]
    values = [layer.index_select(0, at) for layer, at in zip(layers, places, strict=True)]
    for each, at, best in zip(above, places, _top_of_all(values, count), strict=True):
        each.index_copy_(0, at, best)
    return above


def _top_of_all(layers: Sequence[Tensor], count: int) -> list[Tensor]:
    threshold = _highest(layers, count)
    chosen = [layer >= threshold for layer in layers]
    excess = sum(int(each.count_nonzero()) for each in chosen) - count
    for layer, each in zip(reversed(layers), reversed(chosen), strict=True):
        if not excess:
            break
        level = (layer == threshold).nonzero().squeeze(1)
        gone = level[max(len(level) - excess, 0) :]
        each[gone] = False
        excess -= len(gone)
    return chosen


def _highest(layers: Sequence[Tensor], count: int) -> Tensor:
    """Return the `count`-th highest value, exactly, without sorting and without a copy of all."""
    low, high = bounds(layers, count)
    rank, between = count, []
    for layer in layers:
        above = layer > high
        between.append(_where(layer, (layer >= low).logical_and_(above.logical_not())))
        rank -= int(above.count_nonzero())
    near = torch.cat(between)
    return _select(near, rank) if 0 < rank <= len(near) else _select(torch.cat([*layers]), count)


def _where(flat: Tensor, chosen: Tensor) -> Tensor:
    """Return flat[chosen]; on a CPU NumPy is several times as fast."""
    if flat.device.type != "cpu" or flat.dtype == torch.bfloat16:
        return flat[chosen]
    return torch.from_numpy(flat.numpy()[chosen.numpy()])


def nonzero(chosen: Tensor) -> Tensor:
    """Return where a 1-D bool tensor is True, ascending, int64."""
    if chosen.device.type != "cpu":
        return chosen.nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(chosen.numpy()))


def bounds(layers: Sequence[Tensor], count: int) -> tuple[float, float]:
    """Estimate two values between which the `count`-th highest lies, from every n-th value.

    They are four standard deviations of such a sample away. Callers must be right even if the
    estimate is wrong. For few values the bounds are infinite. n has no factor of 2, 3, 5 or 7, or
    the sample could be one place of every 3x3 kernel.
    """
    size = sum(len(layer) for layer in layers)
    if size <= 8 * SAMPLE:
        return -torch.inf, torch.inf
    step = size // SAMPLE
    while math.gcd(step, 2 * 3 * 5 * 7) > 1:
        step += 1
    sample = torch.cat([layer[::step] for layer in layers]).float().cpu().numpy()
    place, share = len(sample) - 1 - count * len(sample) // size, count / size
    margin = 2 + int(4 * (len(sample) * share * (1 - share)) ** 0.5)
    first, last = max(place - margin, 0), min(place + margin, len(sample) - 1)
    parted = np.partition(sample, (first, last))
    return float(parted[first]), float(parted[last])


def _select(flat: Tensor, count: int) -> Tensor:
    """Return the `count`-th highest value."""
    if flat.device.type != "cpu" or flat.dtype == torch.bfloat16:
        return flat.kthvalue(flat.numel() - count + 1).values
    place = flat.numel() - count
    return torch.as_tensor(np.partition(flat.numpy(), place)[place])


def n_of_m(scores: Mapping[str, Tensor], n: int, m: int) -> Masks:
    """Keep the best `n` of every `m` neighbouring inputs of an output (2:4 sparsity and the like).

    Neighbours lie along the second dimension, [out, in, *kernel], at the same kernel position, as
    sparse tensor cores want them (Mishra et al. 2021, arXiv 2104.08378). Layers whose number of
    inputs (per group) is no multiple of `m` are kept whole, as there.
    """
    if not 0 < n <= m:
        raise UsageError(f"a pattern n:m needs 0 < n <= m, got {n}:{m}")
    _check_scores(scores)
    masks = {}
    for name, score in scores.items():
        if score.shape[1] % m:
            masks[name] = torch.ones_like(score, dtype=torch.bool)
            continue
        groups = score.detach().movedim(1, -1).unflatten(-1, (-1, m))
        order = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
        chosen = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True)
        masks[name] = chosen.flatten(-2).movedim(-1, 1).contiguous()
    return masks


def allocate(
    weights: Mapping[str, float],
    sizes: Mapping[str, int],
    kept: int,
    least: int | Mapping[str, int] = 1,
    *,
    most: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Split exactly `kept` weights over layers, layer densities in proportion to `weights`.

    No layer gets more than its size (or than `most`); what a full layer cannot take goes to the
    others in proportion. Fractions are rounded by largest remainder, ties by order. Every layer
    gets `least` (one number, or one per layer), or all that it has.
    """
    upper = dict(most or sizes)
    wanted = dict.fromkeys(sizes, least) if isinstance(least, int) else least
    lower = {name: min(wanted[name], bound) for name, bound in upper.items()}
    if not sum(lower.values()) <= kept <= sum(upper.values()):
        raise UsageError(
            f"{kept} weights cannot be split over {len(sizes)} layers of which each keeps "
            f"{least if isinstance(least, int) else 'one per output channel'} to all"
        )
    share = {name: Fraction(weights[name]) * sizes[name] for name in sizes}
    fixed: dict[str, int] = {}
    while True:
        ideal = _in_proportion(share, kept - sum(fixed.values()), fixed)
        over = {name: upper[name] for name, value in ideal.items() if value > upper[name]}
        under = {name: lower[name] for name, value in ideal.items() if value < lower[name]}
        if not over and not under:
            break
        excess = sum(ideal[name] - upper[name] for name in over)
        lack = sum(lower[name] - ideal[name] for name in under)
        fixed |= {**(over if excess >= lack else {}), **(under if lack >= excess else {})}
    counts = {name: fixed[name] if name in fixed else int(ideal[name]) for name in sizes}
    by_remainder = sorted(ideal, key=lambda name: counts[name] - ideal[name])
    for name in by_remainder[: kept - sum(counts.values())]:
        counts[name] += 1
    return counts


def _in_proportion(
    share: Mapping[str, Fraction], left: int, fixed: Mapping[str, int]
) -> dict[str, Fraction]:
    """Split `left` over the layers that are not fixed; evenly if none has a share."""
    free = [name for name in share if name not in fixed]
    mass = sum(share[name] for name in free)
    return {name: left * share[name] / mass if mass else Fraction(left, len(free)) for name in free}


def ties(scores: Mapping[str, Tensor], chosen: Mapping[str, Tensor], *, by_layer: bool) -> int:
    """Return how many weights share a score of which some were kept and some removed, by position.

    That score is the highest of the removed weights; weights kept by a guard may lie below it.

    Args:
        scores: those that the masks were made by.
        chosen: the masks.
        by_layer: whether every layer had a threshold of its own.
    """
    groups = [[name] for name in chosen] if by_layer else [list(chosen)]
    return sum(_ties_of([(scores[name], chosen[name]) for name in names]) for names in groups)


def _ties_of(layers: Sequence[tuple[Tensor, Tensor]]) -> int:
    threshold = max(
        float(score.masked_fill(mask.to(score.device), -torch.inf).max()) for score, mask in layers
    )
    if threshold == -math.inf:
        return 0
    level = [(score == threshold, mask.to(score.device)) for score, mask in layers]
    kept_ones = sum(int((equal & mask).count_nonzero()) for equal, mask in level)
    return sum(int(equal.count_nonzero()) for equal, _ in level) if kept_ones else 0


def kept(masks: Mapping[str, Tensor]) -> int:
    """Return how many weights the masks keep."""
    return sum(int(mask.count_nonzero()) for mask in masks.values())


def sparsity(masks: Mapping[str, Tensor]) -> float:
    """Return the fraction of prunable weights that the masks remove."""
    return 1 - kept(masks) / total(masks)


def first_empty(masks: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first layer with no weight left, or None."""
    return next((name for name, mask in masks.items() if not mask.any()), None)


def pack(mask: Tensor) -> Tensor:
    """Pack a bool tensor into bits: uint8, 8 weights a byte, in row-major order."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1)))


def unpack(bits: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Undo `pack` for a mask of `shape`."""
    count = int(np.prod(shape))
    flat = np.unpackbits(bits.numpy(), count=count).astype(bool)
    return torch.from_numpy(flat).view(shape)


def fingerprint(masks: Mapping[str, Tensor]) -> str:
    """Return 16 hex digits that differ when any name, shape or bit of the masks differs."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        digest.update(json.dumps([name, list(masks[name].shape)]).encode())
        digest.update(pack(masks[name]).numpy().tobytes())
    return digest.hexdigest()[:16]
