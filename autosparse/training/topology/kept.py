"""Where the values of parameters are kept, and what an optimizer knows of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn


class Kept(Protocol):
    """Where a stepper keeps the values of parameters, and what its optimizer knows of them."""

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """Return the values, [kept], on every rank; called by all ranks."""
        ...

    def change(self, parameter: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
        """Change the values and every moment, [kept] each, alike; called by all ranks."""
        ...


class KeptHere:
    """In this process's own memory: parameters, and the optimizer's state of them."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def whole(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach()

    def change(self, parameter: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
        for tensor in (parameter.detach(), *self.optimizer.state[parameter].values()):
            if torch.is_tensor(tensor) and tensor.shape == parameter.shape:
                tensor.copy_(change(tensor))
