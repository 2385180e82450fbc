"""LAMP: magnitude, made comparable between layers.

Paper: J. Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning (ICLR 2021),
arXiv 2010.07611: score of weight u = θ_u^2 / (sum of θ_v^2 over all v of its layer
that are not smaller). The largest weight of a layer scores 1, so no layer is emptied before every
layer is down to its last.

Departures: none. Of equal weights the first counts as the larger.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autosparse.criteria.base import Scores, register


@register("lamp", needs_data=False)
def lamp(model, parameters, batches, loss_fn) -> Scores:
    """Return the LAMP score, in (0, 1]; 0 for weights that are zero."""
    return {name: layer_scores(weight.detach()) for name, weight in parameters.items()}


def layer_scores(weight: Tensor) -> Tensor:
    """Return the scores of one layer, in its shape."""
    squares, order = weight.flatten().double().square().sort(descending=True, stable=True)
    not_smaller = squares.cumsum(0).clamp(min=torch.finfo(torch.float64).tiny)
    scores = torch.empty_like(squares)
    scores[order] = squares / not_smaller
    return scores.to(weight.dtype).view(weight.shape)
