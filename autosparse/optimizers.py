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
    try:
        optimizer = create_optimizer_v2(
            parameter_groups(model, config.weight_decay),  # type: ignore[arg-type]
            opt=config.optimizer,
            lr=config.learning_rate,
            weight_decay=0.0,
            **config.optimizer_options,
        )
    except (TypeError, ValueError, AssertionError) as error:
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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups: weights, which decay, and biases, norms and what timm exempts."""
    exempt = set(getattr(model, "no_weight_decay", set)())
    decay, none = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        weight = parameter.ndim > 1 or MARK in name
        (decay if weight and name not in exempt else none).append(parameter)
    groups = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": none, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
