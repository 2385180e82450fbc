"""GraSP: keep what the gradient flow after pruning rests on.

Paper: C. Wang, G. Zhang, R. Grosse, Picking Winning Tickets Before Training by Preserving
Gradient Flow (ICLR 2020), arXiv 2002.07376: S(-θ) = -θ * (H g), with g the gradient
of the loss, H its Hessian, and the outputs divided by a temperature (200). The weights with the
highest S are pruned: taking them away lowers the gradient's norm least, or raises it. Here higher
means keep, so the score is θ * (H g). The sign counts; there is no absolute value.

Departures: g and H g are means over all batches (the authors' code adds up two halves of one
set, which ranks alike); the last layer is not drawn anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autosparse.criteria.base import Scores, register
from autosparse.models.contract import each_float
from autosparse.models.gradients import mean_gradients, mean_hessian_times
from autosparse.models.numerics import twice_differentiable


@register("grasp", needs_data=True)
def grasp(model, parameters, batches, loss_fn, *, temperature: float = 200.0) -> Scores:
    """Return θ * (H g).

    Args:
        temperature: what the outputs are divided by, all of them where there are several.
    """

    def loss(outputs: Any, labels: Tensor) -> Tensor:
        return loss_fn(each_float(lambda part: part / temperature, outputs), labels)

    with twice_differentiable():
        g = list(mean_gradients(model, parameters, batches, loss).values())

        scores = mean_hessian_times(g, model, parameters, batches, loss)
    with torch.no_grad():
        return {name: scores[name].mul_(weight) for name, weight in parameters.items()}
