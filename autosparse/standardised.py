"""Convolutions that standardise their weight (NFNet, BiT): a mask must act on what is applied.

timm's StdConv2d and ScaledStdConv2d subtract every filter's mean before they convolve, which
turns pruned zeros into other numbers. Here the kernel is standardised with the zeros counted in
and masked again: kernel = m * standardise(m * θ). The filter's norm is then that of the dense
one, and a filter with one survivor still carries a signal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from timm.layers.padding import pad_same
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

STANDARDISED = (ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame)
MASK = "kernel_mask"


def mask_kernel(module: nn.Module) -> None:
    """Make a standardising convolution mask its kernel; does nothing to other modules.

    What is masked: where the weight is compact, all but its survivors; after `keep_mask`, what
    that says; else every weight that is exactly zero.
    """
    if isinstance(module, STANDARDISED):
        module.forward = MethodType(_forward, module)


def keep_mask(module: nn.Module, mask: Tensor) -> None:
    """Tell a standardising convolution with an ordinary weight what is pruned."""
    if isinstance(module, STANDARDISED):
        module.register_buffer(MASK, mask, persistent=False)


@contextmanager
def kernels_masked(model: nn.Module) -> Iterator[None]:
    """Inside, weights that are exactly zero are zero in the kernel that is applied, too."""
    mine = [m for m in model.modules() if isinstance(m, STANDARDISED) and "forward" not in vars(m)]
    for module in mine:
        mask_kernel(module)
    try:
        yield
    finally:
        for module in mine:
            del module.forward


def as_plain(model: nn.Module) -> nn.Module:
    """Let standardising convolutions apply their weight as it is; in place."""
    for module in model.modules():
        if isinstance(module, STANDARDISED):
            module.forward = MethodType(_forward_plain, module)
    return model


def _forward(self, images: Tensor) -> Tensor:
    weight = self.weight
    gain = (self.gain * self.scale).view(-1) if hasattr(self, "gain") else None
    kernel = functional.batch_norm(
        weight.reshape(1, self.out_channels, -1),
        None,
        None,
        weight=gain,
        training=True,
        momentum=0.0,
        eps=self.eps,
    ).reshape_as(weight)
    return _convolve(self, images, _masked(self, kernel, weight))


def _forward_plain(self, images: Tensor) -> Tensor:
    return _convolve(self, images, self.weight)


def _masked(module: nn.Module, kernel: Tensor, weight: Tensor) -> Tensor:
    if parametrize.is_parametrized(module, "weight"):
        compact: Any = module.parametrizations["weight"][0]  # type: ignore[index]
        return compact(compact.right_inverse(kernel))
    mask = getattr(module, MASK, None)
    return kernel * (weight.detach() != 0 if mask is None else mask)


def _convolve(module: Any, images: Tensor, kernel: Tensor) -> Tensor:
    if getattr(module, "same_pad", False):
        images = pad_same(images, module.kernel_size, module.stride, module.dilation)
    return torch.conv2d(
        images, kernel, module.bias, module.stride, module.padding, module.dilation, module.groups
    )
