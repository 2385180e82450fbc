"""Access to the values of parameters and to their optimizer states, wherever they are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn


class Kept(Protocol):
    """Access to values and moments; ZeRO spreads them over ranks, see deepspeed_values.py."""

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """Return the values, [kept], on every rank; called by all ranks."""
        ...

    def change(self, parameter: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to the values and to every moment, [kept] each; called by all ranks."""
        ...


class KeptHere:
    """Parameters and optimizer states that this process holds whole."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def whole(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach()

    def change(self, parameter: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
        for tensor in (parameter.detach(), *self.optimizer.state[parameter].values()):
            if torch.is_tensor(tensor) and tensor.shape == parameter.shape:
                tensor.copy_(change(tensor))
