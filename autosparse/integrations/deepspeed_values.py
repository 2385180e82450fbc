"""Values and moments of whole parameters under DeepSpeed, wherever ZeRO keeps them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.nn import functional

from autosparse.training.topology.kept import Kept, KeptHere


def kept_by(engine: Any, optimizer: torch.optim.Optimizer) -> Kept:
    """Return where an engine keeps values and moments.

    Args:
        engine: of DeepSpeed.
        optimizer: torch's own, that the engine was given.
    """
    if not engine.zero_optimization_stage():
        return KeptHere(optimizer)
    return (
        KeptSharded(optimizer)
        if engine.zero_optimization_partition_weights()
        else (KeptInShares(optimizer))
    )


class KeptInShares:
    """Under ZeRO 1 and 2: parameters are whole, their moments shared out over the ranks."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def moments(self) -> list[str]:
        """Return the names of what the optimizer keeps for every value, once it has made a step."""
        flat, state = next(iter(self.optimizer.state.items()))
        return [
            name for name, each in state.items()
            if torch.is_tensor(each) and each.shape == flat.shape
        ]  # fmt: skip

    def whole(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach()

    def change(self, parameter: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
        values = parameter.detach()
        values.copy_(change(values))
        safe_set_full_fp32_param(parameter, values)
        for name in self.moments():
            moment = safe_get_full_optimizer_state(parameter, name)
            assert moment is not None
            safe_set_full_optimizer_state(parameter, change(moment), name)


class KeptSharded(KeptInShares):
    """Under ZeRO 3: every rank has a share of all."""

    def whole(self, parameter: nn.Parameter) -> Tensor:
        values = safe_get_full_fp32_param(parameter)
        assert values is not None
        return values

    def change(self, parameter: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
        values = change(self.whole(parameter))
        safe_set_local_fp32_param(parameter, _share(parameter, values))
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.detach().copy_(values)
        for name in self.moments():
            moment = safe_get_full_optimizer_state(parameter, name)
            assert moment is not None
            safe_set_local_optimizer_state(parameter, _share(parameter, change(moment)), name)


def _share(parameter: Any, whole: Tensor) -> Tensor:
    """Return this rank's share. (DeepSpeed's `safe_set_full_*` fail where that does not divide.)"""
    size, rank = parameter.ds_tensor.numel(), dist.get_rank()
    padded = functional.pad(whole, (0, size * dist.get_world_size() - len(whole)))
    return padded.narrow(0, size * rank, size)


def loss_scale(engine: Any) -> float:
    """Return what losses are multiplied by before their gradients are taken (fp16)."""
    scalers = (
        getattr(engine, "torch_autocast_z0_gradscaler", None),
        getattr(engine.optimizer, "torch_autocast_gradscaler", None),
    )
    return next((each.get_scale() for each in scalers if each is not None), 1.0)
