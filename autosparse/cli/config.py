"""Settings of quickstart."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QuickstartConfig:
    """The whole path on scikit-learn's digits."""

    out: str = "quickstart"
    """Folder for everything: corpus, AutoS, tickets, results, figure, MLflow's database."""
    seeds: int = 3
    """How many seeds every ticket is made and trained with."""
