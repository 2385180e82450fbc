"""All compact weights of a model scattered at once, into memory that stays.

The survivors' places stay the same, so zeros are written once, and a step writes values only: one
kernel casts them to the dtype that layers multiply in and scatters them, for a whole group of
weights. Backward gathers a group's gradients by one kernel (flat_kernels.py), or weight by weight.
Results equal those of scattering each weight by itself, bit for bit.

A group's dense weights stay in memory between steps, its dense gradients until the last of them is
computed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.linear import Linear
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from autosparse.core.errors import UsageError, unknown
from autosparse.sparsity.compact import CompactWeight, hand_over
from autosparse.training.config import TrainingConfig

logger = logging.getLogger(__name__)
EACH, FLAT, TRITON, AUTO = "each", "flat", "triton", "auto"
KINDS = (AUTO, EACH, FLAT, TRITON)
"""What `training.scatter` may say."""
LARGEST = 1 << 24
"""Most entries of the dense weights of a group; a larger weight makes a group of its own. Set by
hand: 64 MB in float32."""
STAGES = 8
"""Least number of groups where several ranks train, so that the first gradients are sent while
others are still computed. Set by hand."""
ALIGNED = 64
"""Each weight starts at a multiple of so many entries, for aligned access: 128 bytes in bf16."""
CASTING = {
    kind.forward
    for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, Conv2dSame,
                 Linear)
}  # fmt: skip
"""Forward methods in which autocast casts the whole weight and does nothing else to it."""
INT32 = 1 << 31


@dataclass(frozen=True)
class Slot:
    """Where a compact weight is."""

    module: nn.Module
    attribute: str
    holder: ParametrizationList
    """Of its values."""
    cast: bool
    """Whether autocast casts it, whole, and nothing else is done to it."""

    @property
    def weight(self) -> CompactWeight:
        return self.holder[0]  # type: ignore[return-value]

    @property
    def size(self) -> int:
        """Entries of the dense weight."""
        return math.prod(self.weight.shape)


class _ScatterAll(torch.autograd.Function):
    """Values of a group -> its dense weights; the gradients are gathered together."""

    @staticmethod
    def forward(ctx, group: Group, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.turn = group, group.write(values)
        ctx.set_materialize_grads(False)
        # As `.data`: no views for autograd, and each with a version counter of its own, so that
        # writing the same values again is no change. `turn` tells whether values did change.
        return tuple(view.data for view in group.views)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        group: Group = ctx.group
        if ctx.turn != group.turn:
            raise RuntimeError("compact values were changed between forward and backward")
        if group.recomputed:
            group.let_go()
        needed = ctx.needs_input_grad[1:]
        wanted = [g if n else None for g, n in zip(gradients, needed, strict=True)]
        return None, *(group.each(wanted) if torch.is_grad_enabled() else group.gather(wanted))


class Group:
    """Some compact weights of a model, next to each other in one piece of memory.

    Args:
        slots: where they are; their values have one dtype and lie on one device.
        dtype: of the dense weights.
        kernels: flat_kernels, or None for torch's own operations.
        index_dtype: of the places in the whole group; int64 where int32 is too small.
        recomputed: layers keep their weights until gradients are gathered.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        dtype: torch.dtype,
        kernels: ModuleType | None,
        index_dtype: torch.dtype,
        recomputed: bool,
    ) -> None:
        self.slots, self.recomputed = slots, recomputed
        self.weights = [slot.weight for slot in slots]
        first = slots[0].holder.original
        self.device, self.value_dtype = first.device, first.dtype
        starts = [0]
        for slot in slots:
            starts.append(starts[-1] + -(-slot.size // ALIGNED) * ALIGNED)
        if starts[-1] >= INT32:
            index_dtype = torch.int64
        self.places = torch.cat(
            [weight.places.long() + at for weight, at in zip(self.weights, starts, strict=False)]
        ).to(index_dtype)
        self.memory = torch.zeros(starts[-1], dtype=dtype, device=self.device)
        self.views = [
            slot.weight.layout.dense(self.memory[at : at + slot.size])
            for slot, at in zip(slots, starts, strict=False)
        ]
        self.strides = [view.stride() for view in self.views]
        self.turn, self.versions = 0, ()
        self.awaited = False
        """Whether gradients are still to come."""
        counts = [len(weight.index) for weight in self.weights]
        self.kernels = kernels.Kernels(counts, starts, self.places, first) if kernels else None

    def write(self, values: Sequence[Tensor]) -> int:
        """Scatter the values; return how often they have changed so far."""
        versions = tuple(each._version for each in values)
        if versions != self.versions:
            self.turn, self.versions = self.turn + 1, versions
        if self.kernels:
            self.kernels.scatter(values, self.memory)
        else:
            together = torch.cat([each.detach() for each in values]).to(self.memory.dtype)
            self.memory.scatter_(0, self.places.long(), together)
        return self.turn

    def gather(self, gradients: Sequence[Tensor | None]) -> Iterable[Tensor | None]:
        """Return the gradients of the values for those of the dense weights."""
        captured = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self.kernels and not captured and all(each is not None for each in gradients):
            three = zip(gradients, self.views, self.strides, strict=True)
            alike = [self.laid_out(*each) for each in three]  # type: ignore[arg-type]
            return self.kernels.gather(alike)
        return self.each(gradients)

    def each(self, gradients: Sequence[Tensor | None]) -> Iterable[Tensor | None]:
        """Do what `gather` does weight by weight, so that it can itself be differentiated."""
        for weight, gradient in zip(self.weights, gradients, strict=True):
            if gradient is None:
                yield None
            else:
                gathered = weight.layout.memory(gradient).index_select(0, weight.places)
                yield gathered.to(self.value_dtype)

    def laid_out(self, gradient: Tensor, view: Tensor, strides: tuple[int, ...]) -> Tensor:
        """Return a gradient that lies in memory as its weight does."""
        same = gradient.stride() == strides or _same_order(gradient, view)
        if same and gradient.dtype == view.dtype:
            return gradient
        return torch.empty_strided(view.shape, strides, dtype=view.dtype, device=view.device).copy_(
            gradient
        )

    def begin(self) -> None:
        """Scatter, and hand the weights to their layers."""
        values = [slot.holder.original for slot in self.slots]
        made: Any = _ScatterAll.apply(self, *values)
        self.awaited = any(view.requires_grad for view in made)
        for slot, view in zip(self.slots, made, strict=True):
            hand_over(slot.module, slot.attribute, view)

    def let_go(self) -> None:
        """Take the weights from the layers."""
        for slot in self.slots:
            hand_over(slot.module, slot.attribute, None)


def _same_order(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory alike; sides of 1 may have any stride."""
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(mine == yours for side, mine, yours in strides if side > 1)


class FlatScatter(AbstractContextManager):
    """A context in which a model's forward pass takes its compact weights from one scatter.

    It is entered anew for every forward pass. Backward may come later; not after the values have
    changed and another forward pass has begun, which raises RuntimeError. Layers that multiply
    with survivors alone (cpu_products.py) are left out.

    Args:
        model: compact, on its device, its parameters whole (not under ZeRO 3).
        dtype: what autocast casts weights to around the forward pass; None without autocast.
        kernels: flat_kernels, or None for torch's own operations.
        largest: entries of a group's dense weights.
        index_dtype: int32 or int64; of the places.
        recomputed: layers run again in backward (activation checkpointing), with the same weights.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None = None,
        *,
        kernels: ModuleType | None = None,
        largest: int = LARGEST,
        index_dtype: torch.dtype = torch.int32,
        recomputed: bool = False,
    ) -> None:
        self.groups = [
            Group(slots, kind, kernels, index_dtype, recomputed)
            for slots, kind in _grouped(_slots(model), dtype, largest)
        ]

    def __enter__(self) -> FlatScatter:
        for group in self.groups:
            group.begin()
        return self

    def __exit__(self, *error: object) -> None:
        for group in self.groups:
            # Where layers run again in backward, it lets go once its gradients are gathered.
            if not (group.recomputed and group.awaited) or error != (None, None, None):
                group.let_go()


def _slots(model: nn.Module) -> list[Slot]:
    """Return where the compact weights are that layers multiply with as dense ones."""
    slots = []
    for module in model.modules():
        if not is_parametrized(module):
            continue
        holders: Any = module.parametrizations
        for attribute, holder in holders.items():
            if len(holder) == 1 and isinstance(holder[0], CompactWeight):
                slot = Slot(module, attribute, holder, type(module).forward in CASTING)
                slots += [slot] if slot.weight.pattern is None else []
    return slots


def _grouped(
    slots: list[Slot], dtype: torch.dtype | None, largest: int
) -> list[tuple[list[Slot], torch.dtype]]:
    """Return groups of neighbours with the dtype of their dense weights."""
    groups: list[tuple[list[Slot], torch.dtype]] = []
    open_: dict[tuple[Any, ...], tuple[list[Slot], int]] = {}
    for slot in slots:
        values = slot.holder.original
        low = slot.cast and dtype is not None and values.dtype == torch.float32
        kind = (dtype if low else values.dtype, values.dtype, values.device)
        mine, total = open_.get(kind, ([], 0))
        if not mine or total + slot.size > largest:
            mine, total = [], 0
            groups.append((mine, kind[0]))  # type: ignore[arg-type]
        mine.append(slot)
        open_[kind] = (mine, total + slot.size)
    return groups


def chosen(config: TrainingConfig, device: torch.device, *, sharded: bool = False) -> str:
    """Return how weights are scattered: each by itself, flat, or flat by Triton's kernels.

    By default all at once on CUDA, unless parameters are sharded (ZeRO 3), or `rescatter` is to
    keep no dense weight.
    """
    asked = config.scatter
    if asked not in KINDS:
        raise unknown("scatter", asked, KINDS)
    if asked == AUTO:
        return TRITON if device.type == "cuda" and not sharded and not config.rescatter else EACH
    if asked != EACH:
        told = f"training.scatter {asked} makes all weights dense at once; "
        if config.rescatter:
            raise UsageError(f"{told}leave out training.rescatter")
        if sharded:
            raise UsageError(f"{told}with deepspeed.zero_stage 3 leave it out")
    return asked


def scatterer(
    model: nn.Module,
    config: TrainingConfig,
    device: torch.device,
    *,
    ranks: int = 1,
    sharded: bool = False,
) -> Callable[[], AbstractContextManager]:
    """Return a function that makes the context of a training's forward passes.

    Where Triton's kernels do not run, one line says so, and torch's own operations are taken.
    """
    kind = chosen(config, device, sharded=sharded)
    sizes = [slot.size for slot in _slots(model)]
    if kind == EACH or not sizes:
        return nullcontext
    flat = FlatScatter(
        model,
        {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision),
        kernels=_kernels(device) if kind == TRITON else None,
        largest=LARGEST if ranks == 1 else min(LARGEST, -(-sum(sizes) // STAGES)),
        recomputed=config.grad_checkpointing,
    )
    return lambda: flat


def _kernels(device: torch.device) -> ModuleType | None:
    try:
        from autosparse.training import flat_kernels

        flat_kernels.try_out(device)
    except Exception as error:  # A compiler may fail in any way on an unusual machine.
        first = (str(error).strip().splitlines() or [""])[0]
        logger.warning(
            "Triton's kernels do not run here (%s: %s); compact weights are gathered one by one",
            type(error).__name__, first,
        )  # fmt: skip
        return None
    return flat_kernels
