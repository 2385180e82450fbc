"""timm's optimizers and schedules, with weight decay as compact weights need it."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from autosparse.compaction import MARK
from autosparse.config import TrainingConfig
from autosparse.errors import UsageError


def optimizer_and_schedule(
    model: nn.Module, config: TrainingConfig, steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, Any]:
    """Build timm's optimizer and scheduler; the scheduler is None for a constant rate.

    timm exempts 1-D parameters from weight decay; compact weights are 1-D and yet weights, so
    the groups are made here.
    """
    norm_biases = config.learning_rate * config.bias_rate if config.bias_rate != 1 else None
    try:
        optimizer = create_optimizer_v2(
            parameter_groups(model, config.weight_decay, norm_biases),  # type: ignore[arg-type]
            opt=config.optimizer,
            lr=config.learning_rate,
            weight_decay=0.0,
            **config.optimizer_options,
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"optimizer {config.optimizer}: {error}") from None
    if config.schedule == "none":
        return optimizer, None
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.schedule,
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]
        warmup_prefix=False,
        warmup_lr=0.0,
        min_lr=0.0,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    advance(scheduler, 0)
    return optimizer, scheduler


def advance(scheduler: Any, updates: int) -> None:
    """Set the rate for the step after `updates` steps."""
    if scheduler is not None:
        scheduler.step_update(updates)


def parameter_groups(
    model: nn.Module, weight_decay: float, norm_biases: float | None = None
) -> list[dict[str, Any]]:
    """Return two groups: weights, which decay, and biases, norms and what timm exempts.

    With a rate for `norm_biases` these make a third group.
    """
    exempt = set(getattr(model, "no_weight_decay", set)())
    apart = _norm_biases(model) if norm_biases is not None else set()
    decay, none, fast = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        weight = parameter.ndim > 1 or MARK in name
        if name in apart:
            fast.append(parameter)
        else:
            (decay if weight and name not in exempt else none).append(parameter)
    groups = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": none, "weight_decay": 0.0},
        {"params": fast, "weight_decay": 0.0, "lr": norm_biases},
    ]
    return [group for group in groups if group["params"]]


def _norm_biases(model: nn.Module) -> set[str]:
    """Return the names of the biases of norms, which are known by their class's name."""
    return {
        f"{path}.bias" if path else "bias"
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and isinstance(getattr(module, "bias", None), nn.Parameter)
    }
