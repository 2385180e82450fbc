"""What being compact costs a step: dense weights in bf16 from survivors, and gradients back.

For the weights of resnet50 and ViT-B at 95 %, by themselves. `each`: every weight is scattered into
fresh zeros, then cast, and its gradient gathered by itself. `flat`: all survivors are cast, then
scattered at once into a buffer whose zeros stay, and gathered at once. `ours`: what the
parametrizations of a compact model do under autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.compaction import compact_weights
from autosparse.config import TrainingConfig
from autosparse.models import owner
from autosparse.steppers import autocast
from benchmarks.gpu.goals import SCORED
from benchmarks.gpu.measure import Recorder, Setting, compacted, dense_model, in_turn
from benchmarks.gpu.stage_scoring import MODELS, TINY

SPARSITY, STEPS = 0.95, 20


def run(setting: Setting, recorder: Recorder) -> None:
    side = 32 if setting.tiny else 224
    for name in SCORED:
        config = (TINY if setting.tiny else MODELS)[name]
        model = compacted(dense_model(config, side), SPARSITY).to(setting.device)
        parts = [part for _, part in compact_weights(model)]
        indices, shapes = [part.index for part in parts], [part.shape for part in parts]
        generator = torch.Generator().manual_seed(0)
        gradients = [
            torch.randn(shape, generator=generator).to(setting.device, torch.bfloat16)
            for shape in shapes
        ]
        values = [
            torch.randn(len(each), generator=generator).to(setting.device) for each in indices
        ]
        jobs = {
            "each": one_by_one(values, indices, shapes, gradients),
            "flat": all_at_once(values, indices, shapes, gradients),
            "ours": as_trained(model, gradients, setting),
        }
        assert same(jobs["each"](), jobs["flat"]()), "the two ways differ"
        for way, taken in in_turn(jobs, setting, steps=STEPS).items():
            recorder.add(f"round_ms_{name}_{way}", taken)


def same(one: tuple[list[Tensor], Tensor], other: tuple[list[Tensor], Tensor]) -> bool:
    """Whether two ways give the same dense weights and the same gathered gradients."""
    weights = zip(one[0], other[0], strict=True)
    return all(torch.equal(a, b) for a, b in weights) and torch.equal(one[1], other[1])


def one_by_one(
    values: list[Tensor], indices: list[Tensor], shapes: list[Any], gradients: list[Tensor]
) -> Callable[[], tuple[list[Tensor], Tensor]]:
    """Return a job: every weight by itself."""

    def job() -> tuple[list[Tensor], Tensor]:
        dense = []
        for value, index, shape in zip(values, indices, shapes, strict=True):
            whole = value.new_zeros(shape)
            whole.view(-1).scatter_(0, index.long(), value)
            dense.append(whole.bfloat16())
        gathered = [
            gradient.float().view(-1).index_select(0, index)
            for gradient, index in zip(gradients, indices, strict=True)
        ]
        return dense, torch.cat(gathered)

    return job


def all_at_once(
    values: list[Tensor], indices: list[Tensor], shapes: list[Any], gradients: list[Tensor]
) -> Callable[[], tuple[list[Tensor], Tensor]]:
    """Return a job: all weights in one buffer."""
    sizes = [gradient.numel() for gradient in gradients]
    starts = torch.tensor([0, *sizes[:-1]]).cumsum(0).tolist()
    index = torch.cat([each.long() + start for each, start in zip(indices, starts, strict=True)])
    buffer = torch.zeros(sum(sizes), dtype=torch.bfloat16, device=index.device)
    views = [part.view(shape) for part, shape in zip(buffer.split(sizes), shapes, strict=True)]

    def job() -> tuple[list[Tensor], Tensor]:
        buffer.scatter_(0, index, torch.cat(values).bfloat16())
        flat = torch.cat([gradient.view(-1) for gradient in gradients])
        return views, flat.index_select(0, index).float()

    return job


def as_trained(
    model: nn.Module, gradients: list[Tensor], setting: Setting
) -> Callable[[], tuple[list[Tensor], Tensor]]:
    """Return a job: ask a compact model for all its weights, and go backward."""
    places = [owner(model, name) for name, _ in compact_weights(model)]
    values = [module.parametrizations[attribute].original for module, attribute in places]  # type: ignore[index]
    config = TrainingConfig(precision="bf16")

    def job() -> tuple[list[Tensor], Tensor]:
        with autocast(config, setting.device):
            dense = [getattr(module, attribute).bfloat16() for module, attribute in places]
        torch.autograd.backward(dense, gradients)
        gathered = torch.cat([each.grad for each in values])
        for each in values:
            each.grad = None
        return dense, gathered

    return job
