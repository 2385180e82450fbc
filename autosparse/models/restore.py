"""Leave a model as it was: whatever scoring changes is put back afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model into eval mode, and every module of it back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put everything back afterwards, also after an error.

    That is gradients, `requires_grad`, buffers, modes, all other attributes and caches of modules,
    and the random number generators of CPU and GPUs.
    """
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    needed = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    buffers = [
        (module, dict(module._buffers), _clones(module._buffers)) for module in model.modules()
    ]
    attributes = _attributes(model)
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
            parameter.requires_grad_(needed[name])
        with torch.no_grad():
            for module, held, values in buffers:  # A forward may have put others in their place.
                module._buffers.clear()
                module._buffers.update(held)
                for name, value in values.items():
                    module._buffers[name].copy_(value)  # type: ignore[union-attr]
        _put_back(attributes)


def _clones(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}


def _attributes(model: nn.Module) -> dict[nn.Module, dict[str, tuple[Any, Any]]]:
    """Return all that modules hold beside tensors and hooks, with copies of dicts and lists."""
    return {
        module: {
            key: (value, copy.copy(value) if isinstance(value, dict | list) else None)
            for key, value in vars(module).items()
            if not key.startswith("_")
        }
        for module in model.modules()
    }


def _put_back(attributes: dict[nn.Module, dict[str, tuple[Any, Any]]]) -> None:
    """Undo all changes to modules' attributes since `_attributes`."""
    for module, before in attributes.items():
        for key in [key for key in vars(module) if not key.startswith("_") and key not in before]:
            delattr(module, key)
        for key, (value, content) in before.items():
            if vars(module).get(key, module) is not value:
                vars(module)[key] = value
            if isinstance(value, dict):
                value.clear()
                value.update(content)
            elif isinstance(value, list):
                value[:] = content


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy, also of a model that has kept tensors with a graph (a cache)."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            held = value.values() if isinstance(value, dict) else [value]
            for each in held:
                if isinstance(each, Tensor) and not each.is_leaf:
                    memo[id(each)] = each.detach().clone()
    return copy.deepcopy(model, memo)
