"""AutoS (ours): a distribution over survival, with one head for layers and one for weights.

P(weight is alive at density d) = sigmoid(allocation(layer, d) + selection(weight, d)). The
allocation head predicts how dense iterative pruning leaves a layer, as a correction to the density
of ERK (Mocanu et al. 2018; Evci et al. 2020); with nothing learned, it predicts ERK. The selection
head compares a weight with the others of its layer. Both have outputs for a few densities; between
two of these log-odds are interpolated over log density, and beyond them the nearest counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.autos import features
from autosparse.sparsity import masks
from autosparse.sparsity.counts import keep_density

CONSTANTS = 7
"""How many `context` features, the last ones, are the same for all weights of a layer."""
LIMIT = 3.0
"""Standardised inputs are cut at this many standard deviations, so that no layer is an outlier."""
MOST = 1 - 1e-3
"""ERK densities are cut here, where their log-odds would be infinite."""
DENSITIES = (0.6, 0.37, 0.23, 0.14, 0.087, 0.053, 0.033, 0.02)
"""Those that the heads have outputs for: about 0.02 ** (k / 8), k = 1 to 8, the levels of the
packaged AutoS's corpus."""
SHIFT, BISECTIONS = 40.0, 80
"""Log-odds of 40 are 0 or 1 in float64, and 80 halvings of that interval leave one number."""


def interpolation(density: float, densities: Sequence[float]) -> list[float]:
    """Return the weight of each of `densities` (falling) at `density`: linear in its logarithm."""
    mix = [0.0] * len(densities)
    if density >= densities[0]:
        mix[0] = 1.0
    elif density <= densities[-1]:
        mix[-1] = 1.0
    else:
        place = next(i for i, each in enumerate(densities) if each < density)
        high, low = math.log(densities[place - 1]), math.log(densities[place])
        mix[place] = (high - math.log(density)) / (high - low)
        mix[place - 1] = 1 - mix[place]
    return mix


def erk_log_odds(shapes: Mapping[str, torch.Size], density: float) -> dict[str, float]:
    """Return the log-odds of every layer's ERK density at a density of the whole."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    total = sum(sizes.values())
    counts = masks.allocate(raw, sizes, max(keep_density(total, density), len(sizes)))
    cut = {n: min(max(counts[n] / sizes[n], 1 - MOST), MOST) for n in sizes}
    return {name: math.log(each / (1 - each)) for name, each in cut.items()}


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Return linear layers from the first width to the last, with ReLUs in between."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def apply_mlp(matrices: Sequence[Tensor], biases: Sequence[Tensor], piece: Tensor) -> Tensor:
    """Return an MLP's first output [n] for inputs [F, n]; matrices [out, in], biases [out, 1]."""
    for matrix, bias in zip(matrices[:-1], biases[:-1], strict=True):
        piece = torch.addmm(bias, matrix, piece).relu_()
    return torch.addmm(biases[-1], matrices[-1], piece)[0]


ALLOCATION_HIDDEN = 8
"""Width of the allocation head's hidden layer."""


class Heads(nn.Module):
    """The two networks and the normalisation of their inputs.

    Args:
        hidden: widths of the hidden layers of the selection head.
        densities: those that both heads have outputs for, falling.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        hidden: Sequence[int] = (16, 16),
        densities: Sequence[float] = DENSITIES,
    ) -> None:
        super().__init__()
        self.densities = tuple(densities)
        inputs = len(features.KINDS["context"])
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))
        self.selection = mlp([inputs, *hidden, len(self.densities)])
        self.allocation = mlp([CONSTANTS, ALLOCATION_HIDDEN, len(self.densities)])
        nn.init.zeros_(self.allocation[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.allocation[-1].bias)  # type: ignore[arg-type]

    def normalised(self, inputs: Tensor) -> Tensor:
        """Return [N, F] standardised and cut."""
        return ((inputs - self.mean) / self.std).clamp(-LIMIT, LIMIT)

    def weights_say(self, inputs: Tensor) -> Tensor:
        """Return the selection head's log-odds [N, densities] for features [N, F]."""
        return self.selection(self.normalised(inputs))

    def layers_say(self, constants: Tensor) -> Tensor:
        """Return what is added to ERK's log-odds, [layers, densities], for [layers, CONSTANTS]."""
        scaled = (constants - self.mean[-CONSTANTS:]) / self.std[-CONSTANTS:]
        return self.allocation(scaled.clamp(-LIMIT, LIMIT))

    @torch.no_grad()
    def layer_densities(
        self,
        shapes: Mapping[str, torch.Size],
        contexts: Mapping[str, Any],
        density: float,
        lift: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Return every layer's expected density when the whole has `density`.

        `lift`, if given, is added to the layers' log-odds; then all of them are shifted alike until
        the expected survivors add up to the budget.
        """
        kind = self.mean.dtype
        rows = torch.tensor([contexts[name] for name in shapes], dtype=kind)
        mix = torch.tensor(interpolation(density, self.densities), dtype=kind)
        start = erk_log_odds(shapes, density)
        odds = (self.layers_say(rows.to(self.mean.device)).cpu() @ mix).double()
        more = lift or dict.fromkeys(shapes, 0.0)
        odds += torch.tensor([start[name] + more[name] for name in shapes], dtype=torch.float64)
        sizes = torch.tensor([math.prod(shape) for shape in shapes.values()], dtype=torch.float64)
        expected = torch.sigmoid(odds + _shift(odds, sizes, density))
        return dict(zip(shapes, expected.tolist(), strict=True))

    @torch.no_grad()
    def weight_scores(
        self, weight: Tensor, gradient: Tensor, constants: features.Constants, density: float
    ) -> Tensor:
        """Return the selection head's log-odds at `density`, in the shape of the weight."""
        like = {"dtype": self.mean.dtype, "device": self.mean.device}
        mix = torch.tensor(interpolation(density, self.densities), **like)
        linears = [layer for layer in self.selection if isinstance(layer, nn.Linear)]
        matrices = [layer.weight for layer in linears]
        biases = [layer.bias[:, None] for layer in linears]
        matrices[-1], biases[-1] = mix[None] @ matrices[-1], mix[None] @ biases[-1]
        inputs = torch.tensor(constants, **like)
        scaled = (inputs - self.mean[-CONSTANTS:]) / self.std[-CONSTANTS:]
        fixed = matrices[0][:, -CONSTANTS:] @ scaled.clamp(-LIMIT, LIMIT)
        matrices[0], biases[0] = matrices[0][:, :-CONSTANTS], biases[0] + fixed[:, None]
        mean, std = self.mean[:-CONSTANTS, None], self.std[:-CONSTANTS, None]
        parts = []
        for piece in features.layer_features("context", weight, gradient, None):
            parts.append(
                apply_mlp(matrices, biases, piece.sub_(mean).div_(std).clamp_(-LIMIT, LIMIT))
            )
        return torch.cat(parts).view(weight.shape)


def _shift(odds: Tensor, sizes: Tensor, density: float) -> float:
    """Return what to add to all log-odds so that sum(sizes * sigmoid) is the budget."""
    low, high = -SHIFT, SHIFT
    budget = float(sizes.sum()) * density
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if float((sizes * torch.sigmoid(odds + middle)).sum()) > budget:
            high = middle
        else:
            low = middle
    return (low + high) / 2
