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

import torch
from torch import Tensor

from autosparse.criteria import Scores, register
from autosparse.gradients import inner_product, mean_gradients, mean_of, twice_differentiable


@register("grasp", needs_data=True)
def grasp(model, parameters, batches, loss_fn, *, temperature: float = 200.0) -> Scores:
    """Return θ * (H g).

    Args:
        temperature: what the outputs are divided by.
    """
    tensors = list(parameters.values())

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return loss_fn(outputs / temperature, labels)

    with twice_differentiable():
        g = list(mean_gradients(model, parameters, batches, loss).values())

        def hessian_times_g(images: Tensor, labels: Tensor) -> tuple[Tensor | None, ...]:
            found = torch.autograd.grad(
                loss(model(images), labels), tensors, create_graph=True, allow_unused=True
            )
            return torch.autograd.grad(inner_product(found, g), tensors, allow_unused=True)

        scores = mean_of(batches, hessian_times_g, parameters, passes=2)
    with torch.no_grad():
        return {name: scores[name].mul_(weight) for name, weight in parameters.items()}
