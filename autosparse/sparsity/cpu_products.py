"""Convolutions and linear layers that multiply with surviving weights only, on a CPU.

Where little is left of a wide layer (see `pays`), MKL's sparse products are quicker than dense ones
with zeros, several times at 98 % sparsity, and no dense weight is ever made.

A weight [out, in, ...] is taken as a sparse matrix [out, in * kernel]; a convolution is its product
with the patches of the images, laid out as columns (im2col), a block of images at a time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

BLOCK = 1 << 18
"""Numbers of patches that are laid out at a time: 1 MB in float32, which fits a core's cache."""
DENSE_PER_SPARSE, LAID_OUT_AS = 8, 6
"""A sparse multiply-add takes about as long as 8 dense ones, and laying out a number as 6 sparse
ones. Set by hand; only which way is taken depends on them."""
LANES = 16
"""torch's sampled product works on so many numbers at once, and on the rest one by one."""
DTYPES = (torch.float32, torch.float64)


class Pattern:
    """Where the surviving values of a weight lie, as a sparse matrix and its transpose.

    Args:
        index: positions in the flattened weight, ascending, shape [kept].
        shape: of the weight, [out, in, ...].
    """

    def __init__(self, index: Tensor, shape: tuple[int, ...]) -> None:
        self.shape, self.rows, self.columns = shape, shape[0], math.prod(shape[1:])
        row, column = index.long() // self.columns, index.long() % self.columns
        self.ends, self.column = _ends(row, self.rows), column.int()
        self.order = column.argsort(stable=True).int()
        """Where the values of the transpose come from."""
        self.turned_ends = _ends(column, self.columns)
        self.turned_column = row[self.order].int()

    def positions(self) -> Tensor:
        """Return the positions in the flattened weight."""
        row = torch.arange(self.rows).repeat_interleave(self.ends.diff().long())
        return row * self.columns + self.column

    def matrix(self, values: Tensor) -> Tensor:
        """Return the weight as a CSR matrix [out, in * kernel]."""
        return _csr(self.ends, self.column, values, (self.rows, self.columns))

    def transposed(self, values: Tensor) -> Tensor:
        """Return the CSR matrix [in * kernel, out]."""
        values = values.index_select(0, self.order)
        return _csr(self.turned_ends, self.turned_column, values, (self.columns, self.rows))


def _ends(places: Tensor, count: int) -> Tensor:
    return torch.cat([places.new_zeros(1), places.bincount(minlength=count).cumsum(0)]).int()


def _csr(ends: Tensor, column: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    _silence_beta_warning()
    return torch.sparse_csr_tensor(ends, column, values, shape, check_invariants=False)


@cache
def _silence_beta_warning() -> None:
    """Cause torch's warning that sparse matrices are in beta, which comes once, and suppress it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(1).to_sparse_csr()


def pays(kept: int, shape: tuple[int, ...]) -> bool:
    """Whether sparse products are quicker for a weight of this shape that keeps so many."""
    rows, columns = shape[0], math.prod(shape[1:])
    return kept > 0 and DENSE_PER_SPARSE * (kept + LAID_OUT_AS * columns) < rows * columns


def available(device: torch.device) -> bool:
    """Whether there are sparse products on that device."""
    return device.type == "cpu" and torch.backends.mkl.is_available()


class SparseWeight(Tensor):
    """Stands for a weight of which only the surviving values exist; made by `sparse_weight`.

    `conv2d` and `linear` multiply with these alone. Any other operation makes the dense weight and
    uses that.
    """

    survivors: Tensor
    pattern: Pattern
    dense: Callable[[], Tensor]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DESCRIBING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        own = _PRODUCTS.get(func)
        if own is not None and not torch.is_autocast_enabled("cpu"):
            product = own(*args, **kwargs)
            if product is not None:
                return product
        return func(*map(_dense, args), **{name: _dense(each) for name, each in kwargs.items()})

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise NotImplementedError(f"{func} on a weight of which only the survivors exist")


class _StandIn(torch.autograd.Function):
    """Values [kept] -> SparseWeight; the gradient of its other uses is gathered."""

    @staticmethod
    def forward(ctx, values: Tensor, pattern: Pattern) -> Tensor:
        ctx.pattern = pattern
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            SparseWeight, pattern.shape, dtype=values.dtype, device=values.device
        )

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient.reshape(-1).index_select(0, ctx.pattern.positions()), None


def sparse_weight(values: Tensor, pattern: Pattern, dense: Callable[[], Tensor]) -> SparseWeight:
    """Return a stand-in for a weight.

    Args:
        values: the survivors, shape [kept].
        pattern: where they lie.
        dense: makes the dense weight of them.
    """
    weight: SparseWeight = _StandIn.apply(values, pattern)  # type: ignore[assignment]
    weight.survivors, weight.pattern, weight.dense = values, pattern, dense
    return weight


_DESCRIBING = {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad")
} | {Tensor.size, Tensor.dim}


def _dense(each: Any) -> Any:
    return each.dense() if isinstance(each, SparseWeight) else each


def linear(input: Tensor, weight: SparseWeight, bias: Tensor | None = None) -> Tensor | None:
    """Return what `torch.nn.functional.linear` does; None if it has to be done there."""
    if not _both_plain(input, weight):
        return None
    outputs: Tensor = _Linear.apply(weight.survivors, input, weight.pattern)  # type: ignore[assignment]
    return outputs if bias is None else outputs + bias


def conv2d(
    input: Tensor,
    weight: SparseWeight,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """Return what `torch.nn.functional.conv2d` does; None if it has to be done there."""
    if not _both_plain(input, weight) or groups > 1 or isinstance(padding, str) or input.ndim != 4:
        return None
    kernel = (weight.shape[2], weight.shape[3])
    shape = _Patches(kernel, _pair(stride), _pair(padding), _pair(dilation))
    outputs: Tensor = _Conv.apply(weight.survivors, input, weight.pattern, shape)  # type: ignore[assignment]
    return outputs if bias is None else outputs + bias.view(-1, 1, 1)


_PRODUCTS: dict[Any, Callable[..., Tensor | None]] = {
    functional.linear: linear,
    functional.conv2d: conv2d,
}


def _both_plain(input: Any, weight: Any) -> bool:
    return (
        isinstance(weight, SparseWeight)
        and not isinstance(input, SparseWeight)
        and input.dtype == weight.dtype
        and input.dtype in DTYPES
        and input.numel() > 0
    )


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[-1])


class _Linear(torch.autograd.Function):
    """Values [kept], inputs [..., in] -> outputs [..., out]."""

    @staticmethod
    def forward(ctx, values: Tensor, inputs: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(values, inputs)
        ctx.pattern = pattern
        columns = inputs.reshape(-1, pattern.columns).t().contiguous()
        outputs = pattern.matrix(values) @ columns
        return outputs.t().reshape(*inputs.shape[:-1], pattern.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        values, inputs = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        rows = gradient.reshape(-1, pattern.rows).t().contiguous()
        by_value = by_input = None
        if ctx.needs_input_grad[0]:
            columns = inputs.reshape(-1, pattern.columns).t().contiguous()
            by_value = _at_survivors(pattern, torch.zeros_like(values), rows, columns)
        if ctx.needs_input_grad[1]:
            by_input = (pattern.transposed(values) @ rows).t().reshape(inputs.shape)
        return by_value, by_input, None


def _at_survivors(pattern: Pattern, before: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return rows [out, n] x columns [in, n]^T where a weight survives, added to `before`."""
    short = -rows.shape[1] % LANES
    if short:
        rows, columns = (functional.pad(each, (0, short)) for each in (rows, columns))
    return torch.sparse.sampled_addmm(pattern.matrix(before), rows, columns.t()).values()


@dataclass(frozen=True)
class _Patches:
    """Which patches of an image a convolution sees; (height, width) each."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def count(self, sides: torch.Size) -> tuple[int, int]:
        """Return how many there are in images of these sides: those of the outputs."""
        across = zip(sides, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        down, right = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in across]
        return down, right

    def padded(self, images: Tensor) -> Tensor:
        """Return zeros [in, height, width, images] of the size of the padded images."""
        count, channels, height, width = images.shape
        down, right = self.padding
        return images.new_zeros(channels, height + 2 * down, width + 2 * right, count)

    def inner(self, padded: Tensor) -> Tensor:
        """Return a view of padded images without their padding, [images, in, height, width]."""
        (down, right), (_, height, width, _) = self.padding, padded.shape
        return padded[:, down : height - down, right : width - right].permute(3, 0, 1, 2)

    def windows(self, padded: Tensor, outputs: tuple[int, int]) -> Tensor:
        """Return a view [in, *kernel, *outputs, images] of padded images: all patches."""
        channel, down, right, image = padded.stride()
        strides = (
            channel,
            down * self.dilation[0],
            right * self.dilation[1],
            down * self.stride[0],
            right * self.stride[1],
            image,
        )
        shape = (len(padded), *self.kernel, *outputs, padded.shape[-1])
        return padded.as_strided(shape, strides)

    @property
    def points(self) -> bool:
        """Whether the patches are single points of the images."""
        return self.kernel == (1, 1) and self.padding == (0, 0)

    def columns(self, images: Tensor, outputs: tuple[int, int]) -> Tensor:
        """Return the patches as columns [in * kernel, outputs * images]."""
        if self.points:
            seen = images[:, :, :: self.stride[0], :: self.stride[1]]
            return seen.permute(1, 2, 3, 0).reshape(images.shape[1], -1)
        padded = self.padded(images)
        self.inner(padded).copy_(images)
        return self.windows(padded, outputs).reshape(-1, math.prod(outputs) * len(images))

    def put_back(self, columns: Tensor, images: Tensor, outputs: tuple[int, int]) -> Tensor:
        """Add columns of patches up into images, the transpose of `columns`; return a view."""
        if self.points and self.stride == (1, 1):
            return columns.view(images.shape[1], *outputs, -1).permute(3, 0, 1, 2)
        padded = self.padded(images)
        windows = self.windows(padded, outputs)
        columns = columns.view(windows.shape)
        for down in range(self.kernel[0]):
            for right in range(self.kernel[1]):
                windows[:, down, right].add_(columns[:, down, right])
        return self.inner(padded)


class _Conv(torch.autograd.Function):
    """Values [kept], images [n, in, height, width] -> outputs [n, out, height, width]."""

    @staticmethod
    def forward(ctx, values: Tensor, images: Tensor, pattern: Pattern, patches: _Patches) -> Tensor:
        ctx.save_for_backward(values, images)
        ctx.pattern, ctx.patches = pattern, patches
        sides = patches.count(images.shape[2:])
        shape = (len(images), pattern.rows, *sides)
        outputs = torch.empty(
            shape,
            dtype=images.dtype,
            memory_format=torch.channels_last
            if _channels_last(images)
            else torch.contiguous_format,
        )
        matrix, many = pattern.matrix(values), _block(pattern, sides)
        for some, out in zip(images.split(many), outputs.split(many), strict=True):
            made = matrix @ patches.columns(some, sides)
            out.copy_(made.view(pattern.rows, *sides, len(some)).permute(3, 0, 1, 2))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        values, images = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        patches: _Patches = ctx.patches
        by_value, by_image = ctx.needs_input_grad[:2]
        sides = patches.count(images.shape[2:])
        many = _block(pattern, sides)
        gathered = torch.zeros_like(values) if by_value else None
        back = torch.empty_like(images) if by_image else None
        transposed = pattern.transposed(values) if by_image else None
        for start in range(0, len(images), many):
            some = images[start : start + many]
            rows = gradient[start : start + many].permute(1, 2, 3, 0).reshape(pattern.rows, -1)
            if gathered is not None:
                gathered = _at_survivors(pattern, gathered, rows, patches.columns(some, sides))
            if back is not None and transposed is not None:
                back[start : start + many] = patches.put_back(transposed @ rows, some, sides)
        return gathered, back, None, None


def _channels_last(images: Tensor) -> bool:
    return not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)


def _block(pattern: Pattern, sides: tuple[int, int]) -> int:
    """Return how many images are laid out at a time."""
    return max(1, BLOCK // (pattern.columns * math.prod(sides)))
