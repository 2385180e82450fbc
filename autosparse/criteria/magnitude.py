"""Magnitude pruning: score = |θ|.

Papers: S. A. Janowsky (1989); S. Han et al. (NeurIPS 2015), arXiv 1506.02626. At initialization
it ranks layers by the scale of their initial weights; on trained weights it is what lottery
tickets are found with (Frankle & Carbin, ICLR 2019, arXiv 1803.03635).
"""

from __future__ import annotations

from autosparse.criteria.base import Scores, register


@register("magnitude", needs_data=False)
def magnitude(model, parameters, batches, loss_fn) -> Scores:
    """Return |θ|."""
    return {name: weight.detach().abs() for name, weight in parameters.items()}
