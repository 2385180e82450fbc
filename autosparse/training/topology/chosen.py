"""Which topology a training has, by its settings."""

from __future__ import annotations

from torch import nn

from autosparse.training.config import TrainingConfig
from autosparse.training.topology.base import STATIC, Topology
from autosparse.training.topology.gradual import SCHEDULES, Gradual
from autosparse.training.topology.moving import METHODS, Moving

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
