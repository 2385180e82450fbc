"""GMP: gradual magnitude pruning, from dense to sparse by a cubic schedule.

    s(t) = s_f · (1 − (1 − t / n)³), and s_f from step n on

Paper: M. Zhu, S. Gupta, To prune, or not to prune: exploring the efficacy of pruning for model
compression (2017), arXiv 1710.01878, equation 1, with initial sparsity 0 and t0 = 0.

Departures: magnitudes are compared over all layers, of which each keeps at least one weight,
instead of giving every layer the same sparsity; what is pruned never comes back.
"""

from __future__ import annotations


def sparsity(step: int, every: int, end: int, final: float) -> float:
    """Return the sparsity after `step` steps; it changes every `every` steps, until step `end`."""
    if step >= end:
        return final
    return final * (1 - (1 - step // every * every / end) ** 3)
