"""AC/DC: dense and sparse phases take turns, and the last one is sparse.

Paper: A. Peste, E. Iofinova, A. Vladu, D. Alistarh, AC/DC: Alternating Compressed/DeCompressed
Training of Deep Neural Networks (NeurIPS 2021), arXiv 2106.12379, Algorithm 1: a sparse phase
begins with the largest magnitudes over all layers, in a dense one every weight is trained.

Departures: all phases before the last have one length (the paper has a longer dense one at the
start and before the last); what is pruned loses its moments when a sparse phase begins, so that
nothing revives it; every layer keeps at least one weight.
"""

from __future__ import annotations


def sparsity(step: int, every: int, end: int, final: float) -> float:
    """Return the sparsity after `step` steps: 0 in dense phases, of `every` steps as sparse ones.

    The first phase is dense; from step `end` on it is sparse.
    """
    return final if step >= end or step // every % 2 else 0.0
