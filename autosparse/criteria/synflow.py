"""SynFlow: iterative pruning by synaptic flow, without data.

Paper: H. Tanaka et al., Pruning neural networks without any data by iteratively conserving
synaptic flow (NeurIPS 2020), arXiv 2006.05467, equation 4 and algorithm 1: with all parameters
replaced by their absolute values and an input of ones, R = sum of the outputs and
score = |θ * dR/dθ|; over n rounds the density falls as final^(k/n) (n = 100).

As in the paper's code batch norm is in eval mode. Departures: computed in float64, so that deep
networks neither overflow nor vanish; layers that are no linear maps (softmax, layer norm,
GELU) stay as they are, since the paper covers piecewise linear networks only; weights pruned in
an earlier round rank below all others, in the order in which they were pruned. Where a round
has no flow left at all, the paper's code would fall back on positions; so do the ties here.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from autosparse import masks
from autosparse.criteria import Scores, register
from autosparse.errors import UsageError


@register("synflow", needs_data=False)
def synflow(model, parameters, batches, loss_fn, *, sparsity: float, rounds: int = 100) -> Scores:
    """Return the synaptic flow after the last round; weights that fell in round k score k - n - 1.

    Args:
        sparsity: fraction of weights to remove in the end.
        rounds: n, over which the density falls exponentially.
    """
    if rounds < 1:
        raise UsageError(f"synflow: rounds must be at least 1, got {rounds}")
    linear = _linearised(model)
    weights: dict[str, Tensor] = {name: linear.get_parameter(name) for name in parameters}
    ones = _ones(model, batches, next(iter(weights.values())))
    alive = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    scores = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for number in range(1, rounds + 1):
        flow = _flow(linear, weights, ones)
        density = (1 - sparsity) ** (number / rounds)
        smaller = masks.from_scores(
            flow, 1 - density if number < rounds else sparsity, within=alive
        )
        for name, weight in weights.items():
            fallen = alive[name] & ~smaller[name]
            scores[name][fallen] = number - rounds - 1.0
            weight.data.mul_(smaller[name])
        alive = smaller
    for name, mask in alive.items():
        scores[name][mask] = flow[name][mask]
    return scores


def _linearised(model: nn.Module) -> nn.Module:
    linear = copy.deepcopy(model).eval().double()
    with torch.no_grad():
        for tensor in linear.state_dict().values():
            if tensor.is_floating_point():
                tensor.abs_()
    return linear


def _ones(model: nn.Module, batches: list, like: Tensor) -> Tensor:
    """Return one image of ones: of the batches' shape, or of what the model was built for."""
    recipe: Any = getattr(model, "autosparse_recipe", None)
    registered: Any = getattr(model, "pretrained_cfg", None)
    if batches:
        shape = tuple(batches[0][0].shape[1:])
    elif recipe is not None:
        shape = (recipe["in_chans"], recipe["image_size"], recipe["image_size"])
    elif registered is not None:
        shape = tuple(registered["input_size"])
    else:
        raise UsageError("synflow needs to know the images' shape: give it a batch")
    return torch.ones((1, *shape), dtype=like.dtype, device=like.device)


def _flow(linear: nn.Module, weights: dict[str, Tensor], ones: Tensor) -> Scores:
    total = linear(ones).sum()
    gradients = torch.autograd.grad(total, list(weights.values()))
    return {
        name: (weight.detach() * gradient).abs()
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }
