"""Which of an optimizer's groups hold weights, and those with a gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

WEIGHTS = "weights"
"""Key of an optimizer's group: whether it holds the weights, compact ones too, that decay."""


def weights_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, float]]:
    """Yield every weight that has a gradient, with its learning rate.

    Under ZeRO these are flat partitions of all weights of a group.
    """
    for group in optimizer.param_groups:
        if group.get(WEIGHTS):
            for weight in group["params"]:
                if weight.grad is not None:
                    yield weight, float(group["lr"])
