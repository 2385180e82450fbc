"""HAM: after every step of the optimizer, a hyperbolic step, which favours sparse weights.

    θ ← θ · exp(−lr · (α · sign(θ) · dL/dθ + β))

with θ after the optimizer's step and the gradient before it. Weights near zero change sign more
easily than under the overparameterisation m * w that it stands for.

Paper: T. Jacobs, A. Gadhikar, C. Rubio-Madrigal, R. Burkholz, Hyperbolic Aware Minimization:
Implicit Bias for Sparsity (ICLR 2026), arXiv 2506.02630. α, β and the bounds on the exponent are
those of the authors' published wrapper (α = 200 is for SGD's rates).

Departures: weights are what decays (see optimizers.parameter_groups), compact ones too, instead of
what has two dimensions or more, so that what a model exempts from decay (positions) is left alone.
The gradient is the one that the optimizer used: clipped where `clip_grad` says so. The authors'
clipping of weights at a norm of 1000, and of gradients after the step, is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autosparse.training.groups import weights_of

LARGEST = 5.0
"""Largest size of the exponent, as in the authors' wrapper."""


def ham(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    alpha: float = 200.0,
    beta: float = 1e-3,
) -> None:
    """Have `optimizer` make HAM's step after each of its own.

    Args:
        optimizer: any.
        model: not used.
        alpha: how much the gradient counts.
        beta: how fast weights shrink.
    """

    @torch.no_grad()
    def after(stepped: torch.optim.Optimizer, *_: Any) -> None:
        for weight, rate in weights_of(stepped):
            assert weight.grad is not None
            exponent = weight.sign().mul_(weight.grad).mul_(alpha).add_(beta).mul_(-rate)
            weight.mul_(exponent.clamp_(-LARGEST, LARGEST).exp_())

    optimizer.register_step_post_hook(after)
