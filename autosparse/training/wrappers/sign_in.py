"""Sign-In: gradients are scaled as if each weight were a product m * w, so that signs flip.

Under θ = m · w gradient flow moves θ by −(m² + w²) dL/dθ, and m² − w² = c stays as it is, so

    g = sqrt(4 θ² + c²) · dL/dθ.

Paper: A. Gadhikar, T. Jacobs, C. Zhou, R. Burkholz, Sign-In to the Lottery: Reparameterizing Sparse
Training (NeurIPS 2025), arXiv 2504.12801.

Departures: the paper trains m and w themselves, and sets the inner scale c anew from time to time,
as decay and finite steps change it. Here c is constant and m, w are never stored: this is that flow
with the scale reset at every step, in the memory of θ alone. The scaling comes after clipping. The
paper's c is not known to us; ours is 1 (near zero a step is then that of the optimizer alone). Use
it with SGD and momentum: Adam's division by the gradient's size undoes most of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autosparse.training.groups import weights_of


def sign_in(optimizer: torch.optim.Optimizer, model: nn.Module, scale: float = 1.0) -> None:
    """Have `optimizer` step along Sign-In's gradients.

    Args:
        optimizer: any.
        model: not used.
        scale: c.
    """

    @torch.no_grad()
    def before(stepping: torch.optim.Optimizer, *_: Any) -> None:
        for weight, _rate in weights_of(stepping):
            assert weight.grad is not None
            weight.grad.mul_(weight.square().mul_(4).add_(scale**2).sqrt_())

    optimizer.register_step_pre_hook(before)
