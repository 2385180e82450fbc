"""Iterative SNIP: SNIP again and again, a little pruned in every round.

Paper: P. de Jorge et al., Progressive Skeletonization: Trimming more fat from a network at
initialization (ICLR 2021), arXiv 2006.09081: in round k of n the weights with
the highest |θ * dL/dθ|, at the network as it is pruned by then, are kept to a density of
final^(k/n) (n = 60). What is pruned stays pruned; `force` lets it come back.

Departure: every round looks at the same batches; the authors' code draws new ones.
"""

from __future__ import annotations

from autosparse.criteria.base import Scores, register
from autosparse.criteria.rounds import Take, shrink
from autosparse.models.gradients import Shared, sum_gradients, with_weights


@register("iter_snip", needs_data=True)
def iter_snip(
    model,
    parameters,
    batches,
    loss_fn,
    *,
    sparsity: float,
    rounds: int = 60,
    min_per_layer: int = 1,
) -> Scores:
    """Return |θ * dL/dθ| of the last round; weights that fell in round k score k - n - 1.

    Args:
        sparsity: fraction of weights to remove in the end.
        rounds: n, over which the density falls exponentially.
        min_per_layer: how many weights every layer keeps in every round; 0 as published.
    """
    weights = {name: each.detach().clone().requires_grad_() for name, each in parameters.items()}
    network = with_weights(model, weights)

    def gradient(take: Take) -> int:
        return sum_gradients(network, weights, batches, loss_fn, take)

    return shrink(
        weights,
        gradient,
        sparsity,
        rounds,
        min_per_layer=min_per_layer,
        shared=isinstance(batches, Shared),
    )
