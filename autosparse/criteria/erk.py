"""Erdős-Rényi-Kernel: layer densities from the layers' shapes, random weights inside a layer.

Paper: U. Evci et al., Rigging the Lottery (ICML 2020), arXiv 1911.11134, section 3: the density
of layer l is proportional to (n_in + n_out + kernel height + kernel width) /
(n_in * n_out * kernel height * kernel width); Linear layers have (n_in + n_out) / (n_in * n_out)
(Mocanu et al., 2018). A layer that would need more than all of its weights is kept whole and the
others share the rest, as in the paper's code.

Departure: counts are exact (largest remainder) and no layer gets less than one weight.
n_in is counted per group, so that a depthwise convolution has n_in = 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autosparse.criteria.base import Scores, register
from autosparse.sparsity import masks
from autosparse.sparsity.counts import keep_count


@register("erk", needs_data=False, allocates=True)
def erk(model, parameters, batches, loss_fn, *, sparsity: float, seed: int = 0) -> Scores:
    """Return scores that are positive for exactly the weights that ERK keeps at `sparsity`.

    Inside a layer the scores fall linearly along a random order, so a global threshold at the
    same sparsity gives the ERK densities.
    """
    sizes = {name: weight.numel() for name, weight in parameters.items()}
    density = {name: raw_density(weight.shape) for name, weight in parameters.items()}
    counts = masks.allocate(density, sizes, keep_count(sum(sizes.values()), sparsity))
    generator = torch.Generator().manual_seed(seed)
    return {name: _ranked(weight, counts[name], generator) for name, weight in parameters.items()}


def raw_density(shape: torch.Size) -> float:
    """Return the ERK density of a weight [n_out, n_in, *kernel], up to the common factor."""
    return sum(shape) / math.prod(shape)


def _ranked(weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
    place = torch.empty(weight.numel(), device="cpu")
    order = torch.randperm(weight.numel(), generator=generator, device="cpu")
    place[order] = torch.arange(weight.numel(), dtype=place.dtype, device="cpu")
    return ((count - 0.5 - place) / weight.numel()).view(weight.shape).to(weight.device)
