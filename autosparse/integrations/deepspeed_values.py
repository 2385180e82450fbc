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
    sharded = engine.zero_optimization_partition_weights()
    return KeptSharded(engine.optimizer) if sharded else KeptInShares(engine.optimizer)


class KeptInShares:
    """Under ZeRO 1 and 2: parameters are whole, their moments shared out over the ranks.

    DeepSpeed's `safe_get_full_optimizer_state` cannot be used here: it links moments to parameters
    after the first group's first step, when the other groups have none yet.
    """

    def __init__(self, zero: Any) -> None:
        self.zero = zero
        """DeepSpeed's optimizer, around torch's."""

    def moments(self) -> list[str]:
        """Return the names of what the optimizer keeps for every value, once it has made a step."""
        flat, state = next(iter(self.zero.optimizer.state.items()))
        return [
            name for name, each in state.items()
            if torch.is_tensor(each) and each.shape == flat.shape
        ]  # fmt: skip

    def whole(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach()

    def change(self, parameter: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
        values, mine = parameter.detach(), _Share(self.zero, parameter)
        values.copy_(change(values))
        mine.put(values)
        names = self.moments()
        moments = values.new_zeros((len(names), len(values)), dtype=torch.float32)
        for name, whole in zip(names, moments, strict=True):
            mine.take(whole, name)
        dist.all_reduce(moments, group=getattr(parameter, "_dp_group", None))
        for name, whole in zip(names, moments, strict=True):
            mine.put(change(whole), name)


class _Share:
    """What this rank has of a parameter's values and moments, which may be nothing."""

    def __init__(self, zero: Any, parameter: Any) -> None:
        self.mapping = parameter._hp_mapping
        if self.mapping is not None:
            self.flat = zero.single_partition_of_fp32_groups[self.mapping.param_group_index]
            self.state = zero.optimizer.state[self.flat]
            here, there = self.mapping.hp_fragment_address, self.mapping.lp_fragment_address
            self.here = slice(here.start, here.start + here.numel)
            self.there = slice(there.start, there.start + there.numel)

    def take(self, whole: Tensor, name: str) -> None:
        """Copy a moment's share into the whole one."""
        if self.mapping is not None:
            whole[self.there] = self.state[name][self.here]

    def put(self, whole: Tensor, name: str | None = None) -> None:
        """Copy the share of a moment (of the values by default) out of the whole one."""
        if self.mapping is not None:
            kept = self.flat.detach() if name is None else self.state[name]
            kept[self.here] = whole[self.there]


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
    """Return this rank's share, padded: `safe_set_full_*` fail where shares are not equal."""
    size, rank = parameter.ds_tensor.numel(), dist.get_rank()
    padded = functional.pad(whole, (0, size * dist.get_world_size() - len(whole)))
    return padded.narrow(0, size * rank, size)


def loss_scale(engine: Any) -> float:
    """Return what losses are multiplied by before their gradients are taken (fp16)."""
    scaler = scaler_of(engine)
    return 1.0 if scaler is None else scaler.get_scale()


def scaler_of(engine: Any) -> torch.amp.GradScaler | None:
    """Return what scales losses under fp16, without ZeRO."""
    return engine.torch_autocast_z0_gradscaler
