"""FORCE: foresight connection sensitivity; weights that were pruned may come back.

Paper: P. de Jorge et al., Progressive Skeletonization: Trimming more fat from a network at
initialization (ICLR 2021), arXiv 2006.09081: in round k of n every weight is
scored by |θ * dL/dθ'|, with its own value θ and the gradient taken at θ' = m * θ, the network as
the round before left it; those with the highest are kept, to a density of final^(k/n) (n = 60).

Departure: every round looks at the same batches; the authors' code draws new ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autosparse.criteria.base import Scores, register
from autosparse.criteria.rounds import counts
from autosparse.models.gradients import mean_gradients, with_weights
from autosparse.sparsity import masks


@register("force", needs_data=True)
def force(
    model,
    parameters,
    batches,
    loss_fn,
    *,
    sparsity: float,
    rounds: int = 60,
    min_per_layer: int = 1,
) -> Scores:
    """Return |θ * dL/dθ'| of the last round for what it keeps, below zero for the rest.

    Args:
        sparsity: fraction of weights to remove in the end.
        rounds: n, over which the density falls exponentially.
        min_per_layer: how many weights every layer keeps in every round; 0 as published.
    """
    pruned = {name: each.detach().clone().requires_grad_() for name, each in parameters.items()}
    network = with_weights(model, pruned)
    scores: dict[str, Tensor] = {}
    chosen: masks.Masks = {}
    for count in counts(masks.total(pruned), sparsity, rounds):
        scores.clear()
        scores = mean_gradients(network, pruned, batches, loss_fn)
        with torch.no_grad():
            for name, weight in parameters.items():
                scores[name].mul_(weight).abs_()
            chosen = masks.keep(scores, count, min_per_layer=min_per_layer)
            for name, weight in parameters.items():
                pruned[name].copy_(weight).mul_(chosen[name])
    largest = max(float(score.amax()) for score in scores.values()) or 1.0
    for name, score in scores.items():
        _put_below_zero(score, chosen[name], largest)
    return scores


def _put_below_zero(score: Tensor, kept: Tensor, largest: float) -> None:
    """Move the scores of what is not kept into [-1, -1/2], in place; their order stays."""
    score.copy_(torch.where(kept, score, score / largest / 2 - 1))
