"""How torch is to compute: in full precision, or so that gradients can be differentiated again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from autosparse.core.errors import UsageError

ONLY_ONCE = re.compile(r"derivative for (?:aten::)?(\w+) is not implemented")
"""Torch's message for an operation that has a first derivative only."""


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Compute float32 in full precision and deterministically, for comparisons bit by bit.

    GPUs may round the factors of products to TF32 (10 bits), in which two signals that differ are
    equal; autocast rounds more. All settings are put back afterwards.
    """
    backends: list[tuple[Any, str, Any]] = [
        (torch.backends.cuda.matmul, "fp32_precision", "ieee"),
        (torch.backends.cudnn.conv, "fp32_precision", "ieee"),
        (torch.backends.cudnn.rnn, "fp32_precision", "ieee"),
        (torch.backends.cudnn, "deterministic", True),
        (torch.backends.cudnn, "benchmark", False),
    ]
    before = [(where, key, getattr(where, key)) for where, key, _ in backends]
    try:
        for where, key, value in backends:
            setattr(where, key, value)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for where, key, value in before:
            setattr(where, key, value)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Use the attention that can be differentiated twice; the fused kernels cannot.

    Raises UsageError for what torch cannot differentiate twice at all, such as hard sigmoids.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        match = ONLY_ONCE.search(str(error))
        if match is None:
            raise
        raise UsageError(
            f"torch cannot differentiate the model twice ({match[1]} has no second derivative); "
            "use a criterion that needs first gradients only, such as snip"
        ) from error
