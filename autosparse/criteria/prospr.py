"""ProsPr: which weights matter for the loss after a few steps of training.

Paper: M. Alizadeh et al., Prospect Pruning: Finding Trainable Weights at Initialization using
Meta-Gradients (ICLR 2022), arXiv 2202.08132: with θ_0 = c * θ, c = 1, take k
steps of gradient descent on all parameters; score = |dL(θ_k) / dc|, differentiated through the
steps. Three steps at a rate of 0.1 without momentum are the authors' code's defaults.

The meta-gradient is worked out backwards by hand, v <- v - rate * H(θ_i) v, with the θ_i computed
again from the start: the memory of two sets of weights instead of k + 1. Step i takes batch
i (modulo their number), the loss at the end the one after. Departures: none known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autosparse.core.errors import UsageError
from autosparse.criteria.base import Scores, register
from autosparse.models.gradients import (
    differentiate_again,
    gathered,
    spend,
    with_edges,
    with_weights,
)
from autosparse.models.numerics import twice_differentiable
from autosparse.models.zoo import device_of

Weights = dict[str, Tensor]


@register("prospr", needs_data=True)
def prospr(
    model,
    parameters,
    batches,
    loss_fn,
    *,
    steps: int = 3,
    learning_rate: float = 0.1,
    second_order: bool = True,
    seed: int = 0,
) -> Scores:
    """Return |dL(θ_k) / dc|.

    Args:
        steps: k.
        learning_rate: of the k steps.
        second_order: whether the steps themselves are differentiated; if not, the score is
            |θ * dL/dθ_k|, the paper's first-order variant.
        seed: fixes dropout, the same at every visit of a step.
    """
    if steps < 0:
        raise UsageError(f"prospr: steps must be at least 0, got {steps}")
    batches = gathered(batches, device_of(model))
    start = dict(model.named_parameters())

    def loss(weights: Weights, number: int) -> Tensor:
        torch.manual_seed(seed + number)
        images, labels = batches[number % len(batches)]
        spend(len(labels))
        return loss_fn(with_weights(model, weights)(images), labels)

    def after(count: int) -> Weights:
        weights = {name: each.detach().clone().requires_grad_() for name, each in start.items()}
        for number in range(count):
            slopes = _gradients(loss(weights, number), weights)
            with torch.no_grad():
                for weight, gradient in zip(weights.values(), slopes, strict=True):
                    weight.sub_(gradient, alpha=learning_rate)
            del slopes, gradient
        return weights

    with twice_differentiable():
        weights = after(steps)
        meta = _gradients(loss(weights, steps), weights)
        for number in reversed(range(steps if second_order else 0)):
            weights.clear()
            weights.update(after(number))
            slopes = _gradients(loss(weights, number), weights, create_graph=True)
            products = with_edges(slopes, meta)
            del slopes
            spend(len(batches[number % len(batches)][1]))
            bent: dict[int, Tensor] = {}
            differentiate_again(products, list(weights.values()), bent.__setitem__)
            for place, gradient in bent.items():
                meta[place].sub_(gradient, alpha=learning_rate)
            del products, bent
    by_name = dict(zip(start, meta, strict=True))
    with torch.no_grad():
        return {name: by_name[name].mul_(each).abs_() for name, each in parameters.items()}


def _gradients(value: Tensor, weights: Weights, create_graph: bool = False) -> list[Tensor]:
    """Return the gradients with respect to all weights; zero for a weight that is not used."""
    slopes = torch.autograd.grad(
        value, list(weights.values()), create_graph=create_graph, materialize_grads=True
    )
    return list(slopes)
