"""Which topology a training has, by its settings."""

from __future__ import annotations

from torch import nn

from autosparse.core.errors import UsageError, unknown
from autosparse.training.config import TrainingConfig
from autosparse.training.optimizers import ELEMENTWISE, starts_at_zero
from autosparse.training.topology.base import STATIC, Topology
from autosparse.training.topology.gradual import SCHEDULES, Gradual
from autosparse.training.topology.moving import GROW_FROM, METHODS, Moving

NAMES = (STATIC, *METHODS, *SCHEDULES)
"""What `training.topology` may say."""


def topology_of(
    model: nn.Module, config: TrainingConfig, steps: int, world_size: int = 1
) -> Topology:
    """Return what decides which weights survive; `steps`: of the whole training."""
    if config.topology in SCHEDULES:
        return Gradual(model, config, steps)
    if config.topology in METHODS:
        return Moving(model, config, steps, world_size)
    return Topology(model, config)


def check(config: TrainingConfig) -> None:
    """Raise UsageError for settings that cannot be."""
    if config.topology not in NAMES:
        raise unknown("topology", config.topology, NAMES)
    if config.topology_grow_from not in GROW_FROM:
        raise unknown("topology_grow_from", config.topology_grow_from, GROW_FROM)
    if config.topology_every < 1:
        raise UsageError(f"training.topology_every must be at least 1: {config.topology_every}")
    for name in ("topology_fraction", "topology_until"):
        if not 0 < getattr(config, name) <= 1:
            raise UsageError(
                f"training.{name} must be above 0 and at most 1, got {getattr(config, name)}"
            )
    if not 0 < config.topology_sparsity < 1:
        raise UsageError(
            "training.topology_sparsity must be above 0 and below 1, got "
            f"{config.topology_sparsity}"
        )
    if config.topology_gradient_weight < 0:
        raise UsageError(
            "training.topology_gradient_weight must be at least 0, got "
            f"{config.topology_gradient_weight}"
        )
    if config.topology != STATIC and not starts_at_zero(config):
        known = ", ".join(ELEMENTWISE)
        raise UsageError(
            f"optimizer {config.optimizer} does not keep for every weight a state that starts at "
            f"zero, so that training.topology {config.topology} cannot exchange weights; take one "
            f"of {known}, without initial_accumulator_value (rmsproptf starts at one)"
        )
