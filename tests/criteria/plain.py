"""What these tests share: small nets, batches, and pruning written out the slow way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from autosparse.sparsity.counts import keep_count

Batches = list[tuple[Tensor, Tensor]]


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared distance, mean over samples: its gradient by the outputs is the error."""
    return 0.5 * (outputs - targets).square().sum(1).mean()


def chain(*weights: list[list[float]], between: type[nn.Module] | None = None) -> nn.Sequential:
    """Linear layers without bias, in float64, with these weights; names 0.weight, 1.weight …"""
    layers: list[nn.Module] = []
    for rows in weights:
        layer = nn.Linear(len(rows[0]), len(rows), bias=False).double()
        layer.weight.data = torch.tensor(rows, dtype=torch.float64)
        layers += [layer] if between is None else [layer, between()]
    return nn.Sequential(*(layers if between is None else layers[:-1]))


def samples(*rows: tuple[list[float], list[float]]) -> tuple[Tensor, Tensor]:
    """One batch of (input, target)."""
    inputs, targets = zip(*rows, strict=True)
    return torch.tensor(inputs).double(), torch.tensor(targets).double()


def convnet(seed: int = 0) -> nn.Module:
    """Convolution, batch norm with statistics of its own, tanh, linear; float64; 264 weights."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)
    )
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model.double()


def images(*sizes: int, seed: int = 0) -> Batches:
    """Batches for `convnet`: the same samples in the same order however they are cut."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(sum(sizes), 2, 6, 6, generator=generator).double()
    labels = torch.randint(0, 3, (sum(sizes),), generator=generator)
    return list(zip(pixels.split(list(sizes)), labels.split(list(sizes)), strict=True))


def gradient_by_loop(model: nn.Module, names: Sequence[str], batches: Batches) -> list[Tensor]:
    """Mean over all samples of the gradient of the cross-entropy, by backward()."""
    model = copy.deepcopy(model)
    sums = [torch.zeros_like(model.get_parameter(name)) for name in names]
    for pixels, labels in batches:
        model.zero_grad()
        cross_entropy(model(pixels), labels).backward()
        for sum_, name in zip(sums, names, strict=True):
            sum_ += model.get_parameter(name).grad * len(labels)
    total = sum(len(labels) for _, labels in batches)
    return [sum_ / total for sum_ in sums]


def highest(
    scores: Sequence[Tensor], count: int, alive: Tensor | None = None, least: int = 1
) -> Tensor:
    """Mark the `count` highest by sorting; the best `least` of every layer come first.

    `alive` (all layers end to end) says which may be chosen. Of equal ones the first are taken.
    """
    flat = np.concatenate([score.detach().flatten().double().numpy() for score in scores])
    may = np.ones(len(flat), bool) if alive is None else alive.numpy()
    order = np.lexsort((np.arange(len(flat)), -flat))
    order = order[may[order]]
    layer = np.repeat(np.arange(len(scores)), [score.numel() for score in scores])
    first: list[int] = []
    for number in range(len(scores)):
        first += order[layer[order] == number][:least].tolist()
    rest = order[~np.isin(order, first)]
    chosen = np.zeros(len(flat), bool)
    chosen[np.concatenate([np.array(first, dtype=int), rest])[:count]] = True
    return torch.from_numpy(chosen)


def densities(total: int, sparsity: float, rounds: int) -> list[int]:
    """How many weights each round keeps."""
    steps = [1 - (1 - sparsity) ** (k / rounds) for k in range(1, rounds)]
    return [keep_count(total, each) for each in [*steps, sparsity]]


def under(model: nn.Module, names: Sequence[str], mask: Tensor) -> nn.Module:
    """A copy of the model with its weights multiplied by a mask of all layers end to end."""
    model = copy.deepcopy(model)
    weights = [model.get_parameter(name) for name in names]
    with torch.no_grad():
        for weight, part in zip(weights, mask.split([w.numel() for w in weights]), strict=True):
            weight.mul_(part.view_as(weight))
    return model


def in_rounds(
    model: nn.Module,
    names: Sequence[str],
    score: Callable[[nn.Module, list[Tensor]], list[Tensor]],
    sparsity: float,
    rounds: int,
    *,
    may_return: bool = False,
    least: int = 1,
) -> tuple[list[Tensor], list[Tensor]]:
    """Prune in rounds; `score` gets the network as it is pruned by then, and its own weights.

    Returns the scores and the masks of every round, all layers end to end.
    """
    own = [model.get_parameter(name).detach() for name in names]
    mask = torch.ones(sum(weight.numel() for weight in own), dtype=torch.bool)
    all_scores, all_masks = [], []
    for count in densities(len(mask), sparsity, rounds):
        found = score(under(model, names, mask), own)
        mask = highest(found, count, None if may_return else mask, least)
        all_scores.append(torch.cat([each.flatten() for each in found]))
        all_masks.append(mask)
    return all_scores, all_masks


def fallen_below_zero(scores: list[Tensor], kept: list[Tensor]) -> Tensor:
    """The last round's scores; a weight that fell in round k of n has k - n - 1."""
    result = scores[-1].clone()
    for number in range(len(kept), 0, -1):
        result[~kept[number - 1]] = number - len(kept) - 1
    return result


def flat(scores: dict[str, Tensor]) -> Tensor:
    """All layers end to end."""
    return torch.cat([score.flatten() for score in scores.values()])
