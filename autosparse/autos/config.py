"""Settings of a fit of AutoS."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from autosparse.core.config import local


@dataclass(frozen=True)
class FitConfig:
    """Fit AutoS on a corpus."""

    corpus: str = local("corpus")
    """The corpus folder."""
    features: str = "context"
    """paper (initial weight and gradient) or context (scale-free inputs and layer context)."""
    hidden: list[int] = field(default_factory=lambda: [32, 32])
    """Widths of the hidden layers."""
    head: str = "mean"
    """mean (one number, squared error) or survival (layers and weights apart)."""
    exclude: list[dict[str, Any]] = field(default_factory=list)
    """Runs of the corpus to leave out, e.g. [{model: test_nfnet, label: magnitude}]."""
    holdout: float = 0.25
    """Share of the runs held out whole for validation (at least one); 0 holds out no run and fits
    on all of them; errors are then measured on the training rows."""
    rows_per_run: int = 200_000
    """Weights sampled from each run."""
    epochs: int = 20
    """Passes over the sampled weights."""
    batch_size: int = 4096
    """Weights per step."""
    learning_rate: float = 3e-3
    """Peak learning rate of Adam, cosine schedule."""
    seed: int = 0
    """Fixes the sample, the held-out runs, the initial weights and the order."""
    out: str = local("autos.safetensors")
    """The AutoS file to write."""
