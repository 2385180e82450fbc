"""What being compact costs a step: dense weights in bf16 from survivors, and gradients back.

For the weights of resnet50 and ViT-B at 95 %, by themselves, under autocast: each scattered into
fresh zeros, cast, and its gradient gathered by itself; or a group of them at once
(flat_scatter.py), by torch's operations or Triton's kernels. The floor is one scatter into a buffer
whose zeros stay, and one gather, without autograd.

`round_ms` is what it takes by itself, mostly the host's time, which a training step hides behind
what the device is at; `device_ms` is the device's alone.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor, nn

from autosparse.models.zoo import owner
from autosparse.sparsity.compact import compact_weights
from autosparse.training.config import TrainingConfig
from autosparse.training.flat_scatter import FlatScatter
from autosparse.training.steppers import autocast
from benchmarks.gpu.goals import SCORED
from benchmarks.gpu.measure import (
    Recorder,
    Setting,
    compacted,
    dense_model,
    device_milliseconds,
    in_turn,
)
from benchmarks.gpu.stage_scoring import MODELS, TINY

SPARSITY, STEPS = 0.95, 20
Job = Callable[[], tuple[list[Tensor], Tensor]]
"""Gives the dense weights and all gathered gradients."""


def run(setting: Setting, recorder: Recorder) -> None:
    side = 32 if setting.tiny else 224
    kernels = kernels_of(setting, recorder)
    for name in SCORED:
        config = (TINY if setting.tiny else MODELS)[name]
        model = compacted(dense_model(config, side), SPARSITY).to(setting.device)
        generator = torch.Generator().manual_seed(0)
        gradients = [
            torch.randn(part.shape, generator=generator).to(setting.device, torch.bfloat16)
            for _, part in compact_weights(model)
        ]
        jobs = {
            way: as_trained(model, gradients, flat, setting)
            for way, flat in ways(model, kernels).items()
        }
        jobs["floor"] = floor(model, gradients)
        expected = jobs["each"]()
        for way, job in jobs.items():
            assert same(expected, job()), f"{way} differs from each"
        for way, taken in in_turn(jobs, setting, steps=STEPS).items():
            recorder.add(f"round_ms_{name}_{way}", taken)
        if setting.on_gpu:
            for way, job in jobs.items():
                recorder.add(f"device_ms_{name}_{way}", device_milliseconds(job, setting))


def kernels_of(setting: Setting, recorder: Recorder) -> ModuleType | None:
    """Return Triton's kernels, where they run."""
    try:
        from autosparse.training import flat_kernels

        flat_kernels.try_out(setting.device)
    except Exception as error:  # Whatever hinders a compiler on a strange machine.
        recorder.note("triton", f"{type(error).__name__}: {error}"[:300])
        return None
    recorder.note("triton", "runs")
    return flat_kernels


def ways(model: nn.Module, kernels: ModuleType | None) -> dict[str, AbstractContextManager]:
    """Return the contexts of a forward pass in which weights are scattered."""
    low = torch.bfloat16
    found: dict[str, AbstractContextManager] = {
        "each": nullcontext(),
        "flat": FlatScatter(model, low),
    }
    if kernels:
        found["triton"] = FlatScatter(model, low, kernels=kernels)
        found["triton_int64"] = FlatScatter(model, low, kernels=kernels, index_dtype=torch.int64)
        found["triton_one_group"] = FlatScatter(model, low, kernels=kernels, largest=1 << 62)
    return found


def same(one: tuple[list[Tensor], Tensor], other: tuple[list[Tensor], Tensor]) -> bool:
    """Whether two ways give the same dense weights and the same gathered gradients."""
    weights = zip(one[0], other[0], strict=True)
    return all(torch.equal(a, b) for a, b in weights) and torch.equal(one[1], other[1])


def parts_of(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the modules and attributes of all compact weights."""
    return [owner(model, name) for name, _ in compact_weights(model)]


def as_trained(
    model: nn.Module, gradients: list[Tensor], flat: AbstractContextManager, setting: Setting
) -> Job:
    """Return a job: ask a compact model for all its weights, and go backward."""
    places = parts_of(model)
    values = [getattr(module.parametrizations, attribute).original for module, attribute in places]
    config = TrainingConfig(precision="bf16")

    def job() -> tuple[list[Tensor], Tensor]:
        with autocast(config, setting.device), flat:
            dense = [getattr(module, attribute).bfloat16() for module, attribute in places]
        torch.autograd.backward(dense, gradients)
        gathered = torch.cat([each.grad for each in values])
        for each in values:
            each.grad = None
        return [each.detach() for each in dense], gathered

    return job


def floor(model: nn.Module, gradients: list[Tensor]) -> Job:
    """Return a job: all weights in one buffer, by one operation there and one back."""
    values = [
        getattr(module.parametrizations, attribute).original.detach()
        for module, attribute in parts_of(model)
    ]
    sizes = [gradient.numel() for gradient in gradients]
    starts = torch.tensor([0, *sizes[:-1]]).cumsum(0).tolist()
    parts = [part for _, part in compact_weights(model)]
    index = torch.cat(
        [part.index.long() + start for part, start in zip(parts, starts, strict=True)]
    )
    buffer = torch.zeros(sum(sizes), dtype=torch.bfloat16, device=index.device)
    pieces = zip(buffer.split(sizes), gradients, strict=True)
    views = [piece.view(gradient.shape) for piece, gradient in pieces]

    def job() -> tuple[list[Tensor], Tensor]:
        buffer.scatter_(0, index, torch.cat(values).bfloat16())
        flat = torch.cat([gradient.view(-1) for gradient in gradients])
        return views, flat.index_select(0, index).float()

    return job
