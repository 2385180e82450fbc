"""Settings of scoring and pruning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from autosparse.core.config import local
from autosparse.data.config import DataConfig
from autosparse.models.config import ModelConfig


@dataclass(frozen=True)
class ScoringConfig:
    """What scores are computed on."""

    samples_per_class: int = 10
    """Images of every class in a balanced batch."""
    batches: int = 1
    """Balanced batches; scores are the mean over all of their images."""
    batch_size: int = 128
    """Most images per pass: a larger balanced batch goes through the network in parts."""
    mode: str = "train"
    """train: batch norm uses each part's own statistics, as most papers do; or eval."""
    warm_up: bool = False
    """Set batch norm's running statistics from the batches first (for eval)."""


@dataclass(frozen=True)
class PruneConfig:
    """Prune a model at initialization and save the ticket."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data that scores are computed on."""
    criterion: str = "autos"
    """What scores the weights; `dense` keeps them all."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the criterion, e.g. {scorer: autos.safetensors} or {rounds: 100}."""
    sparsity: float = 0.95
    """Fraction of prunable weights to remove, 0 <= sparsity < 1."""
    scope: str = "global"
    """Over what scores are compared: global or layer."""
    allocation: str | None = None
    """Whose layer densities to use: uniform, or another criterion's name; by default its own."""
    allocation_options: dict[str, Any] = field(default_factory=dict)
    """Options of that other criterion."""
    guard: str = "layer"
    """What every ticket must keep: `layer`, one weight per layer; `channel`, one per output
    channel; `none`, nothing; `live`, one per layer, with weights on no input-to-output path
    exchanged for weights that are on one."""
    pattern: str | None = None
    """n:m, such as 2:4: keep n of every m neighbouring inputs; the sparsity follows from it."""
    units: float = 0.0
    """0 prunes single weights; 1 removes whole channels, heads and hidden units until those left
    just hold the weights that are kept; in between, fewer units go. The number of weights kept is
    always the same."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """What scores are computed on."""
    seed: int = 0
    """Fixes the initial weights, the scored images and random criteria."""
    device: str = local("auto")
    """auto, cpu, cuda …"""
    dead: str = local("warn")
    """What becomes of a ticket whose output does not depend on the image: warn, or error."""
    out: str = local("ticket.safetensors")
    """The ticket file to write."""
