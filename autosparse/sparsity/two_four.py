"""2:4 weights: two of every four neighbouring inputs, after a permutation of the inputs.

Sparse tensor cores multiply such weights (A. Mishra et al. 2021, arXiv 2104.08378). Which inputs
are neighbours is free as long as what is read is permuted alike: a good permutation keeps nearly
all of a weight that was pruned without a pattern (J. Pool and C. Yu, Channel Permutations for N:M
Sparsity, NeurIPS 2021). Theirs searches all swaps of pairs of groups; so does this, all pairs of
columns at once, and takes the best swaps of different groups together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autosparse.sparsity import masks

ROUNDS = 30
"""At most so many rounds of swaps."""
WORST = 16
"""Groups that are looked at in a round: those that lose most."""
SMALL = 1e-6
"""A gain below this share of the whole is rounding."""


def two_four(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight with 2:4 zeros and the order of its columns, int64 [in].

    The product with x is the weight times x[..., order]. The largest |weight| stay.

    Args:
        weight: [out, in], in a multiple of four.
    """
    order = best_order(weight)
    moved = weight[:, order]
    return moved * masks.n_of_m({"": moved.abs()}, 2, 4)[""], order


def kept_score(score: Tensor) -> float:
    """Return what is left of the sum of scores >= 0 [out, in] if two of four stay."""
    return float(score.unflatten(1, (-1, 4)).topk(2, dim=2).values.sum(dtype=torch.float64))


@torch.no_grad()
def best_order(weight: Tensor) -> Tensor:
    """Return an order of columns in which 2:4 keeps more of sum |weight| than most; int64 [in].

    Columns are swapped while that gains, the best swaps first, ties by position. Where nothing can
    be gained the columns stay as they are.
    """
    score = weight.detach().abs().float()
    first = order = torch.arange(score.shape[1], device=score.device)
    whole = float(score.sum(dtype=torch.float64))
    for _ in range(ROUNDS):
        swaps = _swaps(score[:, order], SMALL * whole)
        if not swaps:
            break
        order = order.clone()
        for one, other in swaps:
            order[[one, other]] = order[[other, one]]
    return order if kept_score(score[:, order]) > kept_score(score) else first


def _swaps(score: Tensor, least: float) -> list[tuple[int, int]]:
    """Return pairs of columns to swap, of groups that differ, so that their gains add up.

    A group keeps t1 + max(t2, x) of a row if x comes to the best two of the other three, and
    2 max(t2, x) = t2 + x + |t2 - x|: sums over rows are L1 distances of columns.
    """
    groups = score.unflatten(1, (-1, 4))
    now = groups.topk(2, dim=2).values.sum((0, 2))
    lost = groups.sum((0, 2)) - now
    worst = lost.sort(descending=True, stable=True).indices[:WORST].sort().values
    these = (worst[:, None] * 4 + torch.arange(4, device=score.device)).flatten()
    others = torch.stack(
        [groups[:, :, [e for e in range(4) if e != place]] for place in range(4)], 2
    )
    best, second = others.topk(2, dim=3).values.flatten(1, 2).unbind(-1)
    gain = _with(best[:, these], second[:, these], score) - now.repeat_interleave(4)[these, None]
    gain += _with(best, second, score[:, these]).t() - now.repeat_interleave(4)
    group = torch.arange(score.shape[1], device=score.device) // 4
    gain[group[these, None] == group] = 0
    found, used = [], set()
    ones, twos = (gain > least).nonzero(as_tuple=True)
    best_first = gain[ones, twos].sort(descending=True, stable=True).indices
    for one, other in zip(these[ones][best_first].tolist(), twos[best_first].tolist(), strict=True):
        if not used & {one // 4, other // 4}:
            used |= {one // 4, other // 4}
            found.append((one, other))
    return found


def _with(best: Tensor, second: Tensor, score: Tensor) -> Tensor:
    """Return [places, columns]: what a group keeps with a column of `score` at one of its places.

    `best` and `second` [rows, places] are the best two of the other three.
    """
    apart = torch.cdist(second.t().contiguous(), score.t().contiguous(), p=1)
    return best.sum(0)[:, None] + (second.sum(0)[:, None] + score.sum(0) + apart) / 2
