"""Random pruning: every weight has the same chance.

Paper: S. Liu et al., The Unreasonable Effectiveness of Random Pruning (ICLR 2022),
arXiv 2202.02643. With scope `layer` every layer has exactly the same density (the paper's
"uniform"); with scope `global` its density varies around that by chance.
"""

from __future__ import annotations

import torch

from autosparse.criteria.base import Scores, register


@register("random", needs_data=False)
def random(model, parameters, batches, loss_fn, *, seed: int = 0) -> Scores:
    """Return uniform numbers in [0, 1), drawn on the CPU so that every device agrees."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(weight.shape, generator=generator, device="cpu").to(weight.device)
        for name, weight in parameters.items()
    }
