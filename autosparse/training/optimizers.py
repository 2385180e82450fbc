"""timm's optimizers and schedules, with weight decay as compact weights need it."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from autosparse.core.errors import UsageError
from autosparse.models.zoo import unwrapped
from autosparse.sparsity.compact import compact_weights, dense_name
from autosparse.training.config import TrainingConfig
from autosparse.training.groups import WEIGHTS
from autosparse.training.wrappers import NONE, wrap

ELEMENTWISE = (
    "sgd", "nesterov", "momentum", "sgdw", "nesterovw", "momentumw", "adam", "adamw", "nadam",
    "nadamw", "radam", "adamax", "adadelta", "adagrad", "rmsprop", "rmsproptf", "lion",
)  # fmt: skip
"""Optimizers that treat every weight by itself. For the others a weight's shape or the norm of a
layer matters, and compact weights are 1-D."""
STARTS_AT_ONE = "rmsproptf"
"""Its mean of squares starts at one; the states of the other elementwise ones start at zero."""


def starts_at_zero(config: TrainingConfig) -> bool:
    """Return whether every state that the optimizer keeps of a weight is known to start at zero."""
    given = config.optimizer_options.get("initial_accumulator_value")
    return config.optimizer in ELEMENTWISE and config.optimizer != STARTS_AT_ONE and not given


def optimizer_and_schedule(
    model: nn.Module, config: TrainingConfig, steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, Any]:
    """Build timm's optimizer and scheduler; the scheduler is None for a constant rate.

    timm exempts 1-D parameters from weight decay; compact weights are 1-D and yet weights, so
    the groups are made here.
    """
    norm_biases = config.learning_rate * config.bias_rate if config.bias_rate != 1 else None
    groups = parameter_groups(model, config.weight_decay, norm_biases)
    if config.optimizer_wrapper != NONE:
        weights = set(_decaying(unwrapped(model)))
        groups = [{**each, WEIGHTS: each["params"][0] in weights} for each in groups]
    try:
        optimizer = create_optimizer_v2(
            groups,  # type: ignore[arg-type]
            opt=config.optimizer,
            lr=config.learning_rate,
            weight_decay=0.0,
            **config.optimizer_options,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(f"optimizer {config.optimizer}: {error}") from None
    wrap(optimizer, model, config)
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


def last_rate(optimizer: torch.optim.Optimizer, scheduler: Any, updates: int) -> float:
    """Return the rate of the last of `updates` steps; before the first one, that of the first."""
    advance(scheduler, max(updates - 1, 0))
    rate = optimizer.param_groups[0]["lr"]
    advance(scheduler, updates)
    return rate


def parameter_groups(
    model: nn.Module, weight_decay: float, norm_biases: float | None = None
) -> list[dict[str, Any]]:
    """Return the parameters that need a gradient as groups for an optimizer: decaying, and not.

    Weights decay, compact ones too (1-D as they are); biases, norms and what the model's own
    `no_weight_decay()` names do not. Those names (patterns, as timm reads them) may be the dense
    or the compact ones. timm's `create_optimizer_v2` takes these groups in place of a model; given
    a compact model, it would exempt its compact weights, as it does all 1-D parameters.

    Args:
        model: dense or compact; a compiled or parallel one is looked into.
        weight_decay: of the first group; the second has 0. A group without parameters is left out.
        norm_biases: the rate of the biases of norms, which then make a third group.
    """
    model = unwrapped(model)
    apart = _norm_biases(model) if norm_biases is not None else set()
    weights = set(_decaying(model))
    decay, none, fast = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in apart:
            fast.append(parameter)
        else:
            (decay if parameter in weights else none).append(parameter)
    groups = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": none, "weight_decay": 0.0},
        {"params": fast, "weight_decay": 0.0, "lr": norm_biases},
    ]
    return [group for group in groups if group["params"]]


def _decaying(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield weights, compact ones too, but for what the model's `no_weight_decay()` names."""
    exempt = set(getattr(model, "no_weight_decay", set)())
    compact = {name for name, _ in compact_weights(model)}
    for name, parameter in model.named_parameters():
        plain = dense_name(name)
        spared = any(fnmatch(each, pattern) for each in (name, plain) for pattern in exempt)
        if (parameter.ndim > 1 or plain in compact) and not spared:
            yield parameter


def _norm_biases(model: nn.Module) -> set[str]:
    """Return the names of the biases of norms, which are known by their class's name."""
    return {
        f"{path}.bias" if path else "bias"
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and isinstance(getattr(module, "bias", None), nn.Parameter)
    }
