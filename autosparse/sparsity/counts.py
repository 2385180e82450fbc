"""Exact counts: how many weights a sparsity leaves."""

from __future__ import annotations

import math
from fractions import Fraction

from autosparse.core.errors import UsageError


def check_sparsity(sparsity: float) -> float:
    """Return `sparsity` if 0 <= sparsity < 1; raise UsageError otherwise."""
    if not 0 <= sparsity < 1:
        hint = f"; {sparsity:g} % is {sparsity / 100:g}" if 1 < sparsity < 100 else ""
        raise UsageError(f"sparsity must be at least 0 and below 1, got {sparsity}{hint}")
    return sparsity


def keep_count(total: int, sparsity: float) -> int:
    """Return how many of `total` weights survive at `sparsity`: exact; half a weight is removed.

    The decimal that was written is meant: 0.95 of 1000 removes 950, whatever binary says.
    """
    return keep_density(total, 1 - Fraction(str(check_sparsity(sparsity))))


def keep_density(total: int, density: float | Fraction) -> int:
    """Return how many of `total` weights a density, 0 to 1, keeps: by the rule of `keep_count`."""
    exact = density if isinstance(density, Fraction) else Fraction(str(density))
    return math.ceil(total * exact - Fraction(1, 2))
