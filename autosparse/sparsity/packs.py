"""Many small tensors in few: an entry in a file's header takes some 90 bytes, whatever it holds.

All tensors of a dtype are laid end to end, `packed/float32`; their names and shapes, in `listing`,
are JSON under bzip2 (the same bytes everywhere, which zlib does not promise).
"""

from __future__ import annotations

import bz2
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

LISTING, PACKED = "listing", "packed/"
ENTRY = 90
"""Bytes of an entry in a header, about."""
LONGEST = 1 << 27
"""Most bytes of a listing."""


def pays(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the entries of these tensors would be more than a hundredth of a file."""
    content = sum(each.numel() * each.element_size() for each in tensors.values())
    return ENTRY * len(tensors) > 0.01 * content


def packed(tensors: Mapping[str, Tensor], more: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a tensor [entries] for each dtype, and the listing, which holds `more` besides."""
    parts: dict[str, list[Tensor]] = {}
    listed = []
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        parts.setdefault(dtype, []).append(tensor.detach().cpu().reshape(-1))
        listed.append([name, dtype, list(tensor.shape)])
    text = json.dumps({**more, "tensors": listed}, separators=(",", ":"))
    code = np.frombuffer(bz2.compress(text.encode()), np.uint8).copy()
    packed = {PACKED + dtype: torch.cat(each) for dtype, each in parts.items()}
    return {**packed, LISTING: torch.from_numpy(code)}


def unpacked(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Undo `packed`; raise ValueError for what it did not make."""
    try:
        reader = bz2.BZ2Decompressor()
        text = reader.decompress(tensors[LISTING].numpy().tobytes(), LONGEST)
        if not reader.eof:
            raise ValueError
        more = json.loads(text)
        listed = [(str(name), str(dtype), tuple(shape)) for name, dtype, shape in more["tensors"]]
        starts = dict.fromkeys((dtype for _, dtype, _ in listed), 0)
        unpacked = {}
        for name, dtype, shape in listed:
            first, count = starts[dtype], math.prod(shape)
            unpacked[name] = tensors[PACKED + dtype].narrow(0, first, count).clone().view(shape)
            starts[dtype] += count
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"its listing is garbled ({type(error).__name__})") from None
    return unpacked, more
