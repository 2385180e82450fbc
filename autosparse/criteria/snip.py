"""SNIP: connection sensitivity, how much the loss changes as a weight is removed.

Paper: N. Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity
(ICLR 2019), arXiv 1810.02340, equations 3 to 5: score = |dL/dm| / sum |dL/dm| with the mask m at
one; and dL/dm = θ * dL/dθ.

Departure: the normalising sum is left out, since it doesn't change any comparison. The paper
initialises by variance scaling; here the model's own initial weights are scored.
"""

from __future__ import annotations

import torch

from autosparse.criteria.base import Scores, register
from autosparse.models.gradients import mean_gradients


@register("snip", needs_data=True)
def snip(model, parameters, batches, loss_fn) -> Scores:
    """Return |θ * dL/dθ| with the mean gradient over the batches."""
    gradients = mean_gradients(model, parameters, batches, loss_fn)
    with torch.no_grad():
        return {name: gradients[name].mul_(weight).abs_() for name, weight in parameters.items()}
