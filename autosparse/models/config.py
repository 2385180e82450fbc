"""Settings of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """A timm model and which of its weights may be pruned."""

    name: str = "test_resnet"
    """Any name from `timm.list_models()`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for `timm.create_model`, e.g. {patch_size: 4, drop_path_rate: 0.1}."""
    exclude: list[str] = field(default_factory=list)
    """Prunable weights to leave dense: `head`, `stem`, or patterns such as `layer4.*`."""
    zero_init: bool = False
    """Keep what timm initialises to zero (gains, last norms, heads), which hides layers."""
    small_stem: bool = False
    """ResNets on 32 px: first a 3x3 convolution of stride 1, and no pooling after it."""
