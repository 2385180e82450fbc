"""AutoS: scores from a network that has learned which weights survive iterative pruning.

Paper: S. Liu, Y. Cheng et al., Learning effective pruning at initialization from iterative
pruning, arXiv 2408.14757: a network maps the initial weight and its initial gradient to the
survival that iterative rewind pruning would give it; the lowest scores are pruned.

Departures: with `features: context` the network sees more than those two (see features.py), and
it is a small MLP. With `head: survival` (see heads.py) it says how many weights each layer keeps
at the asked sparsity, and apart from that which ones; by default those are drawn on paths from
input to output (see reach.py), since its own ranking is worth no more than chance.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from autosparse.autos import features
from autosparse.autos.network import AutoS
from autosparse.core.errors import UsageError, unknown
from autosparse.criteria.base import Scores, register
from autosparse.models.gradients import mean_gradients
from autosparse.sparsity import masks, paths, reach
from autosparse.sparsity.counts import keep_count

PRETRAINED = Path(__file__).parent.parent / "autos" / "pretrained" / "autos.safetensors"
CHOICES = ("live", "random", "top", "sampled")
TILT = 1.0
"""Of `live`: see reach.thinned; 0.5 and 1 differ by less than seeds do."""


def fingerprints(scorer: str | None = None, **_) -> dict[str, str]:
    """Return the fingerprints of the AutoS file and of the corpus that it was fitted on."""
    network = found(scorer)
    return {"autos": network.fingerprint, "corpus": network.card.get("corpus", "unknown")}


@register("autos", needs_data=True, provenance=fingerprints, learned=True)
def autos(
    model,
    parameters,
    batches,
    loss_fn,
    *,
    sparsity: float,
    scorer: str | None = None,
    choice: str = "live",
    temperature: float = 1.0,
    reuse: float = 0.25,
    seed: int = 0,
) -> Scores:
    """Return predicted survival; with two heads, scores whose global threshold is their choice.

    `choice` and `temperature` are for two heads; a single one has its highest scores chosen.

    Args:
        sparsity: fraction of weights to remove.
        scorer: an AutoS file; by default the environment's AUTOSPARSE_SCORER, then the one that
            comes with the package.
        choice: inside a layer, with two heads: any weights that lie on paths from input to output
            (live), any (random), the highest log-odds (top), or drawn in proportion to the odds
            without replacement (sampled).
        temperature: what log-odds are divided by before drawing.
        reuse: how much layers are favoured whose weights are used at many places of an image: added
            to their log-odds is reuse * log(places). 0: densities as iterative pruning has them,
            which are better in very short trainings of networks with depthwise layers.
        seed: of what is drawn.
    """
    if choice not in CHOICES:
        raise unknown("choice", choice, CHOICES)
    if temperature <= 0:
        raise UsageError(f"autos: temperature must be above 0, got {temperature}")
    network = found(scorer)
    device = next(iter(parameters.values())).device
    gradients = mean_gradients(model, parameters, batches, loss_fn)
    if network.head == "mean":
        return network.to(device).score(parameters, gradients)
    lift = lifted(model, parameters, batches, reuse)
    scores, densities = network.to(device).rate(parameters, gradients, 1 - sparsity, lift)
    kept = counts(densities, parameters, sparsity)
    generator = torch.Generator().manual_seed(seed)
    for name in scores:
        scores[name] = drawn(scores[name], choice, temperature, generator)
    if choice == "live":
        shape = paths.image_shape(model, batches)
        return marked(reach.best_on_paths(model, scores, kept, shape, tilt=TILT), scores)
    return settled(scores, kept)


def lifted(model, parameters, batches, reuse: float) -> dict[str, float] | None:
    """Return what `reuse` adds to the log-odds of each layer; None for 0."""
    if not reuse:
        return None
    first = next(iter(batches), None)
    image = torch.zeros(1, *paths.image_shape(model)) if first is None else first[0][:1]
    places = features.uses(model, parameters, image.to(next(iter(parameters.values())).device))
    return {name: reuse * math.log(count) for name, count in places.items()}


def marked(chosen: masks.Masks, scores: Mapping[str, Tensor]) -> Scores:
    """Return scores that are positive for what is chosen only, in the order of `scores`."""
    found = {}
    for name, score in scores.items():
        low, high = score.aminmax()
        unit = (score - low) / (high - low).clamp(min=torch.finfo(score.dtype).tiny)
        found[name] = unit + torch.where(chosen[name].to(score.device), 0.5, -1.5)
    return found


def counts(
    densities: Mapping[str, float], parameters: Mapping[str, Tensor], sparsity: float
) -> dict[str, int]:
    """Return the weights that layers keep: in proportion to their densities, exactly the budget."""
    sizes = {name: weight.numel() for name, weight in parameters.items()}
    return masks.allocate(densities, sizes, keep_count(sum(sizes.values()), sparsity))


def settled(scores: Mapping[str, Tensor], kept: Mapping[str, int]) -> Scores:
    """Shift scores so that each layer's highest `kept` are positive, and all others negative."""
    moved = {}
    for name, mask in masks.keep_counts(scores, kept).items():
        score = scores[name]
        edge = score[mask].min() if kept[name] else score.max()
        moved[name] = (score - edge).add_(mask, alpha=2.0).sub_(1.0)
    return moved


def drawn(score: Tensor, choice: str, temperature: float, generator: torch.Generator) -> Tensor:
    """Return scores of which the highest are the choice: Gumbel's trick draws in proportion."""
    if choice == "top":
        return score
    uniform = torch.rand(score.shape, generator=generator).to(score.device)
    if choice == "random":
        return uniform
    if choice == "live":
        return -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-7)))
    return score / temperature - torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-7)))


def found(scorer: str | None) -> AutoS:
    """Return the network of an AutoS file, by default the package's."""
    path = Path(scorer or os.environ.get("AUTOSPARSE_SCORER") or PRETRAINED)
    if not path.is_file():
        raise UsageError(
            f"no AutoS file at {path}; fit one with `autosparse fit` and name it in options.scorer"
        )
    return _loaded(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _loaded(path: Path, changed: int) -> AutoS:
    return AutoS.load(path)
