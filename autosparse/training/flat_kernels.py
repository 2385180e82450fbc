"""Triton kernels that scatter and gather many weights at once; see flat_scatter.py.

With TRITON_INTERPRET=1 in the environment they run on a CPU, for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Survivors of one weight that one program of the grid moves."""
COLUMNS = 5
"""Of a row of the table: the weight's number, the first survivor of the block and the one after its
last, the weight's first survivor, and where the weight starts in the group's memory."""
TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _move(  # noqa: ANN202 - Triton reads what is annotated.
    addresses,
    table,
    places,
    target,
    kind: tl.constexpr,
    gathers: tl.constexpr,
    columns: tl.constexpr,
    block: tl.constexpr,
):
    """Scatter one block of survivors into the group's memory, or gather one from gradients."""
    row = table + tl.program_id(0) * columns
    source = tl.load(addresses + tl.load(row)).to(tl.pointer_type(kind))  # type: ignore[arg-type]
    at = tl.load(row + 1) + tl.arange(0, block)
    here = at < tl.load(row + 2)
    place = tl.load(places + at, mask=here, other=0)
    if gathers:
        value = tl.load(source + (place - tl.load(row + 4)), mask=here, other=0.0)
        tl.store(target + at, value.to(target.dtype.element_ty), mask=here)
    else:
        value = tl.load(source + (at - tl.load(row + 3)), mask=here, other=0.0)
        tl.store(target + place, value.to(target.dtype.element_ty), mask=here)


class Kernels:
    """Scatters and gathers one group of weights.

    Args:
        counts: survivors of each weight.
        starts: where each weight starts in the group's memory.
        places: of all survivors in the group's memory, weight by weight, int32 or int64.
        like: values; theirs are the device and dtype of the gathered gradients.
    """

    def __init__(
        self, counts: Sequence[int], starts: Sequence[int], places: Tensor, like: Tensor
    ) -> None:
        self.counts, self.places, self.dtype = list(counts), places, like.dtype
        rows, first = [], 0
        for weight, (count, start) in enumerate(zip(counts, starts, strict=False)):
            rows += [
                (weight, at, min(at + BLOCK, first + count), first, start)
                for at in range(first, first + count, BLOCK)
            ]
            first += count
        self.blocks = len(rows)
        table = torch.tensor(rows, dtype=torch.int64).reshape(-1, COLUMNS)
        self.table = table.to(places.device)
        self.values, self.gradients = Addresses(places.device), Addresses(places.device)

    def scatter(self, values: Sequence[Tensor], memory: Tensor) -> None:
        """Write each weight's values, contiguous, into the group's memory, in its dtype."""
        self._run(self.values.of(values), memory, self.dtype, gathers=False)

    def gather(self, gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return each weight's gradient at its survivors.

        Args:
            gradients: of the dense weights, of one dtype, each as its weight lies in memory.
        """
        total = len(self.places)
        gathered = torch.empty(total, dtype=self.dtype, device=self.places.device)
        self._run(self.gradients.of(gradients), gathered, gradients[0].dtype, gathers=True)
        return gathered.split(self.counts)

    def _run(self, addresses: Tensor, target: Tensor, kind: torch.dtype, *, gathers: bool) -> None:
        if self.blocks:
            with torch.cuda.device_of(target):  # Triton launches on the current device.
                launch: Any = _move[(self.blocks,)]
                launch(
                    addresses, self.table, self.places, target, TYPES[kind], gathers, COLUMNS, BLOCK
                )


class Addresses:
    """Addresses of tensors, sent to the device anew only when one has changed."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.known = device, None

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the address of every tensor, int64, on the device."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        if addresses != self.known:
            sent = torch.tensor(addresses, dtype=torch.int64)
            if self.device.type == "cuda":
                sent = sent.pin_memory()
            self.known, self.sent = addresses, sent.to(self.device, non_blocking=True)
        return self.sent


@cache
def try_out(device: torch.device) -> None:
    """Raise whatever keeps the kernels from running on a device."""
    values = [torch.tensor([1 / 3, 2 / 3], device=device), torch.tensor([3.0], device=device)]
    places = torch.tensor([3, 1, 6], dtype=torch.int32, device=device)
    kernels = Kernels([2, 1], [0, 4], places, values[0])
    # The interpreter does not round to bf16 as a GPU does.
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
        memory = torch.zeros(8, dtype=dtype, device=device)
        kernels.scatter(values, memory)
        gathered = torch.cat(kernels.gather([memory[:4], memory[4:]]))
        rounded = torch.cat(values).to(dtype)
        expected = torch.zeros_like(memory).scatter_(0, places.long(), rounded)
        if not torch.equal(memory, expected) or not torch.equal(gathered, rounded.float()):
            raise RuntimeError(f"they give wrong results in {dtype}")
