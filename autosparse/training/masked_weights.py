"""Ordinary, dense weights that are trained under masks, for what has no compact weights.

The masks are tensors of 0 and 1 that stay where they are: a change is written into them, so that
whatever was compiled for one mask serves the next.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from autosparse.models.standardised import keep_mask, mask_kernel
from autosparse.models.zoo import owner


class MaskedWeights:
    """Some weights of a model and their masks, which keep everything at first.

    Args:
        model: dense, on its device.
        names: the parameters that may be pruned.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.weights = {name: model.get_parameter(name) for name in names}
        self.masks = {name: torch.ones_like(w).detach() for name, w in self.weights.items()}
        self.mask_kernels_of(model)

    def mask_kernels_of(self, model: nn.Module) -> None:
        """Have the masks act on kernels that convolutions make of their weights (NFNet).

        Args:
            model: the model itself, or a copy of it such as its moving average.
        """
        for name, mask in self.masks.items():
            module, _ = owner(model, name)
            mask_kernel(module)
            keep_mask(module, mask)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the gradients of pruned weights to zero."""
        pairs = [(w.grad, self.masks[n]) for n, w in self.weights.items() if w.grad is not None]
        if pairs:
            torch._foreach_mul_(*(list(each) for each in zip(*pairs, strict=True)))

    @torch.no_grad()
    def mask_values(self) -> None:
        """Set pruned weights to zero."""
        torch._foreach_mul_(list(self.weights.values()), list(self.masks.values()))
