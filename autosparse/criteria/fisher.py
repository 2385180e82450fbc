"""Empirical Fisher: what the loss changes by when a weight is removed, to second order.

Paper: I. Gollini Navarrete et al., Fishing For Cheap And Efficient Pruners At Initialization
(2025), arXiv 2502.11450, Fisher-Taylor sensitivity, after Y. LeCun et al., Optimal Brain Damage
(NeurIPS 1989): the Hessian's diagonal is taken from the empirical Fisher matrix, F = mean over
samples of the squared gradient, and the change is g * δ + F * δ^2 / 2 with δ = -θ.

As in the authors' code every sample has a gradient of its own and batch norm is in eval mode;
`warm_up` sets its statistics first. Departures: δ is -θ in the first term too (the authors' code
adds θ * g and θ^2 * F / 2, as for δ = +θ); no layer is left dense.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autosparse.criteria.base import Scores, register
from autosparse.models.gradients import Batches, Shared, mean_over_gradients


@register("fisher", needs_data=True)
def fisher(model, parameters, batches, loss_fn, *, first_order: bool = True) -> Scores:
    """Return |F * θ^2 / 2 - g * θ|.

    Args:
        first_order: whether the term in g counts; without it, Optimal Brain Damage's saliency.
    """
    model.eval()

    def parts(gradient: Tensor) -> list[Tensor]:
        return [gradient.square(), gradient] if first_order else [gradient.square_()]

    means = mean_over_gradients(model, parameters, _one_by_one(batches), loss_fn, parts)
    scores = {}
    with torch.no_grad():
        for name, weight in parameters.items():
            change = means.pop(name).mul_(weight).div_(2)
            if first_order:
                change.sub_(means.pop(f"{name} 1"))
            scores[name] = change.mul_(weight).abs_()
    return scores


def _one_by_one(batches: Batches) -> Batches:
    """Return the batches cut into single samples."""
    samples = (
        (image, label)
        for images, labels in batches
        for image, label in zip(images.split(1), labels.split(1), strict=True)
    )
    return Shared(samples) if isinstance(batches, Shared) else samples
