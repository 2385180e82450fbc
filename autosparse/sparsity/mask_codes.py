"""Masks in few bytes: a bit per weight, or the gaps between the weights that are kept.

Gaps between places chosen at random are geometric, for which Golomb's code is the shortest there is
(S. Golomb 1966); R. Rice's variant (1979) takes powers of two: the k low bits of a gap as they are,
what is above them in unary. It comes within 4 % of the entropy, from 0.3 density down.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from autosparse.sparsity import masks

SPARSE = 0.3
"""Gaps are tried below this density only: above it they would gain nothing."""


def gaps(mask: Tensor) -> Tensor | None:
    """Return a mask as the code of its gaps, uint8; None where a bit per weight is not longer.

    The first byte is k; then come the k low bits of every gap, and in a byte of their own the
    rest in unary: as many zeros, and a one.
    """
    places = np.flatnonzero(mask.detach().cpu().numpy())
    count = len(places)
    if not count or count > SPARSE * mask.numel():
        return None
    gaps = np.diff(places, prepend=-1) - 1
    lengths = [_length(gaps, low) for low in range(int(gaps.max()).bit_length() + 1)]
    low = int(np.argmin(lengths))
    if lengths[low] >= (mask.numel() + 7) // 8:
        return None
    high = gaps >> low
    unary = np.zeros(int(high.sum()) + count, dtype=bool)
    unary[np.cumsum(high + 1) - 1] = True
    bits = (gaps[:, None] >> np.arange(low)) & 1
    parts = [np.array([low], np.uint8), np.packbits(bits.astype(bool)), np.packbits(unary)]
    return torch.from_numpy(np.concatenate(parts))


def _length(gaps: np.ndarray, low: int) -> int:
    """Return the bytes of the code with so many low bits."""
    count = len(gaps)
    return 1 + (count * low + 7) // 8 + (int((gaps >> low).sum()) + count + 7) // 8


def from_gaps(code: Tensor, shape: tuple[int, ...], count: int) -> Tensor:
    """Undo `gaps` for a mask of `shape` that keeps `count`; raise ValueError for what is none."""
    if code.dtype != torch.uint8 or not code.numel():
        raise ValueError("no code")
    data = code.numpy()
    low = int(data[0])
    first = 1 + (count * low + 7) // 8
    ones = np.flatnonzero(np.unpackbits(data[first:]))
    if low > 32 or len(ones) != count:
        raise ValueError(f"{len(ones)} gaps, not {count}")
    bits = np.unpackbits(data[1:first], count=count * low).reshape(count, low).astype(np.int64)
    high = np.diff(ones, prepend=-1) - 1
    places = np.cumsum((high << low) + (bits << np.arange(low)).sum(1) + 1) - 1
    mask = np.zeros(int(np.prod(shape)), dtype=bool)
    if count and places[-1] >= len(mask):
        raise ValueError(f"place {places[-1]} of {len(mask)}")
    mask[places] = True
    return torch.from_numpy(mask).view(shape)


def encoded(name: str, mask: Tensor) -> tuple[str, Tensor]:
    """Return a mask as a tensor of a file, and the name that tells how: gaps/NAME or mask/NAME.

    A mask that keeps all is no byte long.
    """
    if mask.numel() and bool(mask.all()):
        return f"gaps/{name}", torch.zeros(0, dtype=torch.uint8)
    code = gaps(mask)
    return (f"mask/{name}", masks.pack(mask)) if code is None else (f"gaps/{name}", code)


def decoded(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], count: int) -> Tensor:
    """Return the mask `name` of a file's tensors, of which `count` weights are kept.

    Raises KeyError where it is missing, ValueError where it does not fit its shape.
    """
    if f"gaps/{name}" not in tensors:
        bits = tensors[f"mask/{name}"]
        if bits.numel() != (int(np.prod(shape)) + 7) // 8:
            raise ValueError(f"{bits.numel()} bytes")
        return masks.unpack(bits, shape)
    code = tensors[f"gaps/{name}"]
    if not code.numel() and count == int(np.prod(shape)):
        return torch.ones(shape, dtype=torch.bool)
    return from_gaps(code, shape, count)
