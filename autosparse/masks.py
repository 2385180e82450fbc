"""From scores to masks: exact counts, ties broken by position, no layer emptied unasked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from autosparse.config import keep_count
from autosparse.errors import UsageError, unknown

Masks = dict[str, Tensor]
SCOPES = ("global", "layer")


def from_scores(
    scores: Mapping[str, Tensor],
    sparsity: float,
    *,
    scope: str = "global",
    min_per_layer: int = 1,
    within: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Remove the fraction `sparsity` (0 <= sparsity < 1) of all weights: see `keep`."""
    total = sum(score.numel() for score in scores.values())
    count = keep_count(total, sparsity)
    return keep(scores, count, scope=scope, min_per_layer=min_per_layer, within=within)


def keep(
    scores: Mapping[str, Tensor],
    count: int,
    *,
    scope: str = "global",
    min_per_layer: int = 1,
    within: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Keep exactly the `count` highest scores.

    Args:
        scores: a finite float tensor per prunable parameter; higher = keep. Equal scores are kept
            in the order of the parameters and of the positions inside them.
        count: how many weights to keep, over all layers.
        scope: `global` compares all weights; `layer` keeps the same density in every layer.
        min_per_layer: every layer keeps its best so many weights; 0 allows layer collapse.
        within: masks that the result must lie inside (IRP: what is gone stays gone).
    """
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)
    _check_scores(scores)
    inside = kept(within) if within else sum(score.numel() for score in scores.values())
    if count > inside:
        raise UsageError(f"{count} weights are to be kept, but only {inside} are left")
    if scope == "layer":
        sizes = {name: score.numel() for name, score in scores.items()}
        most = {name: int(mask.sum()) for name, mask in within.items()} if within else None
        counts = allocate(dict.fromkeys(sizes, 1.0), sizes, count, min_per_layer, most=most)
        return _keep_counts(scores, counts, within)
    return _keep_global(scores, count, min_per_layer, within)


def _check_scores(scores: Mapping[str, Tensor]) -> None:
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise UsageError(f"the scores of {name} are not finite; nothing was pruned")


def _keep_counts(
    scores: Mapping[str, Tensor], counts: Mapping[str, int], within: Mapping[str, Tensor] | None
) -> Masks:
    masks = {}
    for name, score in scores.items():
        flat = score.detach().flatten()
        if within is not None:
            flat = flat.masked_fill(~within[name].flatten().to(flat.device), -torch.inf)
        masks[name] = top(flat, counts[name]).view(score.shape)
    return masks


def _keep_global(
    scores: Mapping[str, Tensor],
    count: int,
    min_per_layer: int,
    within: Mapping[str, Tensor] | None,
) -> Masks:
    guarded = sum(min(min_per_layer, score.numel()) for score in scores.values())
    if count < guarded:
        raise UsageError(
            f"{count} weights are too few for {len(scores)} layers of at least {min_per_layer} "
            "each; lower the sparsity"
        )
    sizes = [score.numel() for score in scores.values()]
    flat = torch.cat([score.detach().flatten() for score in scores.values()])
    if within is not None:
        inside = torch.cat([within[name].flatten().to(flat.device) for name in scores])
        flat.masked_fill_(~inside, -torch.inf)
    chosen = top(flat, count)
    if _guard(flat, chosen, sizes, min_per_layer):
        chosen = top(flat, count)
    parts = chosen.split(sizes)
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def _guard(flat: Tensor, chosen: Tensor, sizes: list[int], min_per_layer: int) -> bool:
    """If a layer keeps too few, raise the best of every layer above all; return whether it did."""
    least = [min(min_per_layer, size) for size in sizes]
    kept_now = [int(part.sum()) for part in chosen.split(sizes)]
    if all(now >= wanted for now, wanted in zip(kept_now, least, strict=True)):
        return False
    for layer, wanted in zip(flat.split(sizes), least, strict=True):
        best = top(layer, wanted)
        layer[best & (layer > -torch.inf)] = torch.inf
    return True


def top(flat: Tensor, count: int) -> Tensor:
    """Return a bool tensor that marks the `count` highest of a 1-D tensor; ties: first ones."""
    if count <= 0:
        return torch.zeros_like(flat, dtype=torch.bool)
    if count >= flat.numel():
        return torch.ones_like(flat, dtype=torch.bool)
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    above = flat > threshold
    level = (flat == threshold).nonzero().squeeze(1)
    above[level[: count - int(above.sum())]] = True
    return above


def allocate(
    weights: Mapping[str, float],
    sizes: Mapping[str, int],
    kept: int,
    min_per_layer: int = 1,
    *,
    most: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Split exactly `kept` weights over layers, layer densities in proportion to `weights`.

    No layer gets more than it has (or than `most` allows); what a full layer leaves goes to the
    others in proportion. Fractions are settled by largest remainder, ties by order. Every layer
    gets `min_per_layer`.
    """
    upper = dict(most or sizes)
    lower = {name: min(min_per_layer, bound) for name, bound in upper.items()}
    if not sum(lower.values()) <= kept <= sum(upper.values()):
        raise UsageError(
            f"{kept} weights cannot be split over {len(sizes)} layers with "
            f"{min_per_layer} to all of each"
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


def kept(masks: Mapping[str, Tensor]) -> int:
    """Return how many weights the masks keep."""
    return sum(int(mask.sum()) for mask in masks.values())


def sparsity(masks: Mapping[str, Tensor]) -> float:
    """Return the fraction of prunable weights that the masks remove."""
    return 1 - kept(masks) / sum(mask.numel() for mask in masks.values())


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
