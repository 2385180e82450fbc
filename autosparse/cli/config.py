"""Settings of commands that have no package of their own."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QuickstartConfig:
    """The whole path on scikit-learn's digits."""

    out: str = "quickstart"
    """Folder for everything: corpus, AutoS, tickets, results, figure, MLflow's database."""
    seeds: int = 3
    """How many seeds every ticket is made and trained with."""


@dataclass(frozen=True)
class PromoteConfig:
    """Which version of a registered model becomes champion."""

    version: int = 0
    """The version that wants to be champion."""
    metric: str | None = None
    """What is compared; by default test_accuracy, for AutoS validation_mse."""
    better: str | None = None
    """lower or higher: which is better, for a metric of which that is not known."""
    force: bool = False
    """Promote without a comparison."""
