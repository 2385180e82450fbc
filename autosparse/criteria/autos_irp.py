"""AutoS with short levels: training ranks the weights, AutoS says how many each layer keeps.

As in short_irp.py, every level trains the subnetwork from its initial weights for `steps_per_level`
steps and keeps the largest weights. Two things differ. How many weights a layer keeps comes from
AutoS's allocation head (see heads.py), which was fitted on iterative pruning with levels of full
length. And AutoS alone prunes before any training, as at high density a few steps tell no more
than initial weights do: to a quarter of the weights, by its odds; if the levels that follow would
be too steep, further, drawn on paths. No paper has this method; docs/results/log.md has figures.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import torch

from autosparse.autos.network import AutoS
from autosparse.core.errors import UsageError
from autosparse.criteria import autos
from autosparse.criteria.base import Masks, Scores, register
from autosparse.criteria.short_irp import Best, Horizon, short_levels
from autosparse.models.gradients import mean_gradients
from autosparse.models.zoo import device_of
from autosparse.sparsity import masks, paths, reach
from autosparse.sparsity.counts import keep_density
from autosparse.training.config import TrainingConfig

ROUNDS = 4
"""Rounds in which a level removes weights; those that lose their paths in one go first in the next.
What was measured with four: docs/results/log.md."""
BATCHES = 2
"""Training batches that the initial gradient, an input of AutoS, is taken on."""


@register(
    "autos_irp",
    needs_data=True,
    trains=True,
    provenance=autos.fingerprints,
    learned=True,
    chooses=True,
)
def autos_irp(
    model,
    parameters,
    batches,
    loss_fn,
    *,
    sparsity: float,
    scorer: str | None = None,
    levels: int = 4,
    steps_per_level: int = 140,
    start: float = 0.25,
    fall: float = 2.5,
    movement: float = 1.0,
    live: bool = True,
    reuse: float = 0.25,
    batch_size: int = 64,
    optimizer: str = "adamw",
    learning_rate: float = 1e-2,
    weight_decay: float = 0.05,
    seed: int = 0,
) -> Masks:
    """Return the masks of the last level.

    Args:
        sparsity: fraction of weights to remove in the end.
        scorer: an AutoS file with the head survival; by default as for `autos`.
        levels: how often the network is pruned after that; the density falls exponentially.
        steps_per_level: of training, from the initial weights.
        start: density that AutoS prunes to before any step, by its odds; 1: not at all.
        fall: the largest factor that a level prunes by. If it would be more, the network is thinned
            first as `autos` does, to fall ** levels times the final density.
        movement: how much of a weight's movement counts: |initial weight + movement * change|.
        live: at every level weights go first that lie on no path from input to output.
        reuse: as of `autos`: how much layers are favoured whose weights are used at many places.
        batch_size, optimizer, learning_rate, weight_decay: as of `short_irp`.
        seed: fixes what is drawn, and dropout.
    """
    network = autos.load_scorer(scorer)
    _check(network, start, fall)
    if iter(batches) is batches:
        batches = list(islice(batches, max(steps_per_level, BATCHES)))
    device = device_of(model)
    first = [(images.to(device), labels.to(device)) for images, labels in islice(batches, BATCHES)]
    if not first:
        raise UsageError("criterion autos_irp needs data, and there is no batch")
    layers = _Layers(
        network.to(device),
        parameters,
        mean_gradients(model, parameters, first, loss_fn),
        _followed(model, first, live),
        autos.use_lift(model, parameters, first, reuse),
    )
    training = TrainingConfig(
        optimizer=optimizer, learning_rate=learning_rate, weight_decay=weight_decay, schedule="none"
    )
    horizon = Horizon(sparsity, levels, steps_per_level, training, seed)
    steep = (1 - sparsity) * fall**levels
    alive = layers.drawn(steep, seed) if steep < start else layers.first(max(start, 1 - sparsity))
    best = layers.by_movement(movement)
    return short_levels(model, batches, loss_fn, horizon, best, alive)


def _check(network: AutoS, start: float, fall: float) -> None:
    if network.head != "survival":
        raise UsageError("autos_irp needs an AutoS with the head survival")
    if not 0 < start <= 1:
        raise UsageError(f"autos_irp: start must be above 0 and at most 1, got {start}")
    if fall <= 1:
        raise UsageError(f"autos_irp: fall must be above 1, got {fall}")


def _followed(model, batches, live: bool) -> Callable[..., Masks]:
    """Return the function that keeps the highest scores; `live`: on paths first."""
    shape = paths.image_shape(model, batches)

    def choose(
        scores: Scores, kept: dict[str, int], within: Masks, rounds: int, tilt: float
    ) -> Masks:
        if not live:
            return masks.keep_counts(scores, kept, within=within)
        return reach.best_on_paths(
            model, scores, kept, shape, within=within, rounds=rounds, tilt=tilt
        )

    return choose


class _Layers:
    """Masks whose layer counts AutoS predicts from the initial weights and gradients."""

    def __init__(
        self,
        network: AutoS,
        parameters: Scores,
        gradients: Scores,
        choose: Callable,
        lift: dict[str, float] | None,
    ) -> None:
        self.network, self.parameters, self.gradients = network, parameters, gradients
        self.choose, self.lift = choose, lift
        self.total = masks.total(parameters)

    def by_movement(self, movement: float) -> Best:
        """Return how a level chooses: by |initial weight + movement * change|."""
        initial = {name: weight.detach().cpu() for name, weight in self.parameters.items()}

        def best(trained: Scores, alive: Masks, count: int) -> Masks:
            scores = {
                name: initial[name].lerp(weight, movement).abs() for name, weight in trained.items()
            }
            return self.best(scores, alive, count)

        return best

    def best(
        self,
        scores: Scores,
        alive: Masks,
        count: int,
        rounds: int = ROUNDS,
        tilt: float = 0.0,
    ) -> Masks:
        """Keep `count` of the living weights: in each layer its share by AutoS, the highest scores.

        `rounds` and `tilt` are those of reach.thinned.
        """
        densities = self.network.layer_densities(
            self.parameters, self.gradients, count / self.total, self.lift
        )
        kept = masks.allocate(
            densities,
            {name: mask.numel() for name, mask in alive.items()},
            count,
            most=masks.counts(alive),
        )
        return self.choose(scores, kept, alive, rounds, tilt)

    def first(self, density: float) -> Masks:
        """Return the masks that AutoS's odds alone prune to, before any step."""
        alive = masks.dense(self.parameters, "cpu")
        if density == 1:
            return alive
        odds = self.network.odds(self.parameters, self.gradients, density)
        scores = {name: score.cpu() for name, score in odds.items()}
        return self.best(scores, alive, keep_density(self.total, density))

    def drawn(self, density: float, seed: int) -> Masks:
        """Return masks as `autos` draws them, on paths."""
        alive = masks.dense(self.parameters, "cpu")
        generator = torch.Generator().manual_seed(seed)
        scores = {n: autos.noise_for("live", mask, generator) for n, mask in alive.items()}
        count = keep_density(self.total, density)
        return self.best(scores, alive, count, reach.ROUNDS, autos.TILT)
