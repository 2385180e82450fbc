"""Convolutions that standardise their weight (NFNet, BiT): a mask must act on the kernel.

timm's StdConv2d and ScaledStdConv2d subtract every filter's mean before they convolve, which
turns pruned zeros into other numbers. Here the kernel is standardised with the zeros counted in
and masked again: kernel = m * standardise(m * θ). The filter's norm is then that of the dense
one, and a filter with one survivor still carries a signal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers.padding import pad_same
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

MASK = "kernel_mask"


class _Masked(nn.Module):
    """Masks the kernel.

    The mask is that of the compact weight, or the one given to `keep_mask`; otherwise every weight
    that is exactly zero is masked.
    """

    def forward(self, images: Tensor) -> Tensor:
        return _convolve(self, images, _masked(self, _standardised(self)))


class _Plain(nn.Module):
    """Applies the weight as it is."""

    def forward(self, images: Tensor) -> Tensor:
        return _convolve(self, images, self.weight)  # type: ignore[arg-type]


def _with(behaviour: type, timms: type) -> type:
    """Return timm's class with another forward, such as MaskedStdConv2d."""
    name = behaviour.__name__.strip("_") + timms.__name__
    return type(name, (behaviour, timms), {"__module__": __name__})


KINDS: dict[type, tuple[type, type]] = {
    timms: (_with(_Masked, timms), _with(_Plain, timms))
    for timms in (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
}
"""timm's class -> ours that masks the kernel, and ours that applies the weight as it is."""
globals().update({ours.__name__: ours for both in KINDS.values() for ours in both})  # For pickle.
STANDARDISED = tuple(KINDS)
BASE = {ours: timms for timms, both in KINDS.items() for ours in both}


def mask_kernel(module: nn.Module) -> None:
    """Make a standardising convolution mask its kernel; does nothing to other modules."""
    if type(module) in KINDS:
        module.__class__ = KINDS[type(module)][0]


def keep_mask(module: nn.Module, mask: Tensor) -> None:
    """Give a masking convolution with an ordinary weight its mask."""
    if isinstance(module, _Masked):
        module.register_buffer(MASK, mask, persistent=False)


@contextmanager
def kernels_as_they_are(model: nn.Module) -> Iterator[None]:
    """Let all convolutions apply their weights without standardising them, until the end."""
    classes = {module: type(module) for module in model.modules()}
    try:
        for module, kind in classes.items():
            timms = BASE.get(kind, kind)
            if timms in KINDS:
                module.__class__ = KINDS[timms][1]
        yield
    finally:
        for module, kind in classes.items():
            module.__class__ = kind


def unmask(model: nn.Module) -> None:
    """Turn all convolutions back into timm's, without a mask; in place."""
    for module in model.modules():
        if type(module) in BASE:
            module.__class__ = BASE[type(module)]
            if hasattr(module, MASK):
                delattr(module, MASK)


@contextmanager
def kernels_masked(model: nn.Module) -> Iterator[None]:
    """Inside, weights that are exactly zero are zero in the kernel that is applied, too."""
    mine = [module for module in model.modules() if type(module) in KINDS]
    for module in mine:
        mask_kernel(module)
    try:
        yield
    finally:
        for module in mine:
            module.__class__ = BASE[type(module)]


@contextmanager
def kernels_gated(model: nn.Module, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside `kernels_masked`, multiply kernels by gates in [0, 1], which may have a graph.

    `gates` are named as the weights are, and may hold those of other layers too.
    """
    mine = [
        (module, gates[f"{name}.weight"])
        for name, module in model.named_modules()
        if isinstance(module, _Masked) and f"{name}.weight" in gates
    ]
    try:
        for module, gate in mine:
            vars(module)[MASK] = gate
        yield
    finally:
        for module, _ in mine:
            vars(module).pop(MASK, None)


def as_plain(model: nn.Module) -> nn.Module:
    """Let standardising convolutions apply their weight as it is; in place."""
    for module in model.modules():
        kind = BASE.get(type(module), type(module))
        if kind in KINDS:
            module.__class__ = KINDS[kind][1]
    return model


@torch.no_grad()
def differs_from_plain(model: nn.Module) -> str | None:
    """Return the first convolution whose masked kernel is not the one that timm's class makes.

    Zeros that are masked again are the same only where whole filters are kept or removed.
    """
    for name, module in model.named_modules():
        if isinstance(module, _Masked):
            kernel = _standardised(module)
            if not torch.allclose(_masked(module, kernel), kernel, rtol=1e-5, atol=1e-6):
                return name
    return None


def _standardised(module: Any) -> Tensor:
    weight = module.weight
    gain = (module.gain * module.scale).view(-1) if hasattr(module, "gain") else None
    return functional.batch_norm(
        weight.reshape(1, module.out_channels, -1),
        None,
        None,
        weight=gain,
        training=True,
        momentum=0.0,
        eps=module.eps,
    ).reshape_as(weight)


def _masked(module: Any, kernel: Tensor) -> Tensor:
    if parametrize.is_parametrized(module, "weight"):
        return module.parametrizations["weight"][0].masked(kernel)
    mask = getattr(module, MASK, None)
    return kernel * (module.weight.detach() != 0 if mask is None else mask)


def _convolve(module: Any, images: Tensor, kernel: Tensor) -> Tensor:
    if getattr(module, "same_pad", False):
        images = pad_same(images, module.kernel_size, module.stride, module.dilation)
    return torch.conv2d(
        images, kernel, module.bias, module.stride, module.padding, module.dilation, module.groups
    )
