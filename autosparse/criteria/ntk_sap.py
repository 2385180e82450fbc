"""NTK-SAP: keep what the neural tangent kernel rests on, whatever the weights and the data.

Paper: Y. Wang, D. Li, R. Sun, NTK-SAP: Improving neural network pruning by aligning training
dynamics (ICLR 2023), arXiv 2304.02840: score = |d/dm of the mean of
||f(x; m * θ) - f(x; m * (θ + Δ))||^2|, m the mask, θ drawn anew (Kaiming normal) for every batch,
Δ normal with standard deviation ε, x normal noise; over n rounds the density falls as
final^(k/n).

As in the authors' code batch norm takes its statistics from the unperturbed network, for both;
n = 20, five draws a round and ε = 0.01 are its settings for CIFAR-10. Of the batches only the
shapes are looked at. Departure: the square is a mean over samples, which ranks alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, repeat

import torch
from torch import Tensor, nn

from autosparse.core.errors import UsageError
from autosparse.criteria.base import Scores, register
from autosparse.criteria.rounds import Take, shrink
from autosparse.models.batch_norm import batch_norms, last_statistics
from autosparse.models.contract import joined
from autosparse.models.gradients import Shared, backward_one_by_one, with_weights


@register("ntk_sap", needs_data=True)
def ntk_sap(
    model,
    parameters,
    batches,
    loss_fn,
    *,
    sparsity: float,
    rounds: int = 20,
    draws: int = 5,
    epsilon: float = 0.01,
    min_per_layer: int = 1,
    seed: int = 0,
) -> Scores:
    """Return the score of the last round; weights that fell in round k score k - n - 1.

    Args:
        sparsity: fraction of weights to remove in the end.
        rounds: n, over which the density falls exponentially.
        draws: of weights, perturbations and images per round and batch.
        epsilon: standard deviation of the perturbation.
        min_per_layer: how many weights every layer keeps in every round; 0 as published.
        seed: fixes all draws.
    """
    if draws < 1 or epsilon <= 0:
        raise UsageError(
            f"ntk_sap: draws must be at least 1 and epsilon above 0: {draws}, {epsilon}"
        )
    torch.manual_seed(seed)
    kept = {name: torch.ones_like(each, dtype=torch.uint8) for name, each in parameters.items()}

    def gradient(take: Take) -> int:
        samples = 0
        for images, labels in chain.from_iterable(repeat(batches, draws)):
            _one_draw(model, parameters, kept, epsilon, images, take)
            samples += len(labels)
        return samples

    return shrink(
        kept,
        gradient,
        sparsity,
        rounds,
        min_per_layer=min_per_layer,
        shared=isinstance(batches, Shared),
        passes=2 + 1 / 3,
    )


def _one_draw(model, parameters, kept, epsilon: float, images: Tensor, take: Take) -> None:
    """Draw weights, perturbations and images; hand over the gradients, summed over the images."""
    here = {name: _drawn(weight) for name, weight in parameters.items()}
    there = {name: each + epsilon * torch.randn_like(each) for name, each in here.items()}
    for weights in (here, there):
        for name, weight in weights.items():
            weight.mul_(kept[name]).requires_grad_()
    noise = torch.randn_like(images)
    mask_gradients(model, here, there, noise, lambda place, g: take(place, g.mul_(len(images))))


def mask_gradients(
    model: nn.Module,
    here: Mapping[str, Tensor],
    there: Mapping[str, Tensor],
    images: Tensor,
    take: Take,
) -> None:
    """Hand over d/dm of the mean of ||f(x; m * here) - f(x; m * there)||^2 at the present masks.

    `here` and `there` are masked already, so the gradient is right where the mask is one, and
    zero where it is zero. Its two parts, by `here` and by `there`, come one after the other.
    """
    _set_statistics(model, here, images)
    first, second = (joined(with_weights(model, each)(images)) for each in (here, there))
    square = (first - second).square().sum() / len(images)
    weights = [*here.values(), *there.values()]

    def take_part(place: int, gradient: Tensor) -> None:
        take(place % len(here), gradient.mul_(weights[place].detach()))

    backward_one_by_one(square, weights, take_part)


def _drawn(weight: Tensor) -> Tensor:
    """Return new initial values for a weight."""
    return nn.init.kaiming_normal_(torch.empty_like(weight, requires_grad=False))


def _set_statistics(model: nn.Module, weights: Mapping[str, Tensor], images: Tensor) -> None:
    """Set batch norm's statistics to those of the images, and leave the model in eval mode."""
    model.train()
    with torch.no_grad(), last_statistics(batch_norms(model)):
        with_weights(model, weights)(images)
    model.eval()
