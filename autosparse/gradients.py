"""The mean gradient of the loss over given batches, and how to look without leaving a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from autosparse.errors import UsageError

LossFn = Callable[[Tensor, Tensor], Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put gradients, buffers, modes, `requires_grad` and the CPU and GPU RNGs back afterwards."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    needed = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = {name: module.training for name, module in model.named_modules()}
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
            parameter.requires_grad_(needed[name])
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        for name, module in model.named_modules():
            module.training = modes[name]


def mean_gradients(
    model: nn.Module, parameters: Mapping[str, Tensor], batches: Batches, loss_fn: LossFn
) -> dict[str, Tensor]:
    """Return dL/dθ for each of `parameters`, the mean over all samples of all batches.

    Args:
        model: in the mode that is wanted; its buffers may change (see `untouched`).
        parameters: those to differentiate by, by name.
        batches: (images, labels) on the model's device; sizes may differ.
        loss_fn: (outputs, labels) -> mean loss of the batch.
    """
    names, tensors = list(parameters), list(parameters.values())
    total = [torch.zeros_like(tensor) for tensor in tensors]
    samples = 0
    for images, labels in batches:
        loss = loss_fn(model(images), labels)
        parts = torch.autograd.grad(loss, tensors, allow_unused=True)
        for sum_, part in zip(total, parts, strict=True):
            if part is not None:
                sum_.add_(part, alpha=len(labels))
        samples += len(labels)
    if not samples:
        raise UsageError("no batch to compute gradients on")
    return {name: sum_.div_(samples) for name, sum_ in zip(names, total, strict=True)}
