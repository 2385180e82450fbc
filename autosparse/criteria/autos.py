"""AutoS: scores from a network that has learned which weights survive iterative pruning.

Paper: S. Liu, Y. Cheng et al., Learning effective pruning at initialization from iterative
pruning, arXiv 2408.14757: a network maps the initial weight and its initial gradient to the
survival that iterative rewind pruning would give it; the lowest scores are pruned.

Departures: with `features: context` the network sees more than those two (see features.py), and
it is a small MLP. With `head: survival` (see heads.py) it predicts how many weights each layer
keeps at a given sparsity. Which ones is drawn at random, by default on paths from input to output
(see reach.py), as its own ranking inside layers was no better than chance.
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
from autosparse.criteria.base import Masks, Scores, register
from autosparse.criteria.erk import raw_density
from autosparse.criteria.units import Dial, rooms
from autosparse.models.gradients import mean_gradients, note
from autosparse.sparsity import masks, paths, reach
from autosparse.sparsity.counts import keep_count

PRETRAINED = Path(__file__).parent.parent / "autos" / "pretrained" / "autos.safetensors"
AUTO = "auto"
CHOICES = (AUTO, "live", "random")
DENSITIES = (AUTO, "learned", "erk")
TILT = 1.0
"""Exponent of the path sums by which weights are drawn (see reach.thinned): in proportion to them.
0.5 and 1 differed by less than seeds do (docs/results/log.md)."""


def fingerprints(scorer: str | None = None, **_) -> dict[str, str]:
    """Return the fingerprints of the AutoS file and of the corpus that it was fitted on."""
    network = load_scorer(scorer)
    return {"autos": network.fingerprint, "corpus": network.card.get("corpus", "unknown")}


def has_two_heads(scorer: str | None = None, **_) -> bool:
    """Return whether an AutoS file tells layers and weights apart, and so gives a choice."""
    return load_scorer(scorer).head == "survival"


@register(
    "autos", needs_data=True, provenance=fingerprints, learned=True, chooses=has_two_heads,
    takes_units=True,
)  # fmt: skip
def autos(
    model,
    parameters,
    batches,
    loss_fn,
    *,
    sparsity: float,
    scorer: str | None = None,
    choice: str = AUTO,
    reuse: float = 0.25,
    densities: str = AUTO,
    seed: int = 0,
    units: Dial | None = None,
) -> Scores | Masks:
    """Return the masks that an AutoS file with two heads chooses; with a single head, its scores.

    Args:
        sparsity: fraction of weights to remove.
        scorer: an AutoS file; by default the environment's AUTOSPARSE_SCORER, then the one that
            comes with the package.
        choice: which weights a layer keeps (two heads only): drawn among those on paths from input
            to output (live), or among all (random). auto: live, but random where a network is
            `of_tokens` and no units go: there drawing on paths cost four to five points
            (docs/autos.md).
        reuse: how much layers are favoured whose weights are used at many places of an image: added
            to their log-odds is reuse * log(places) (two heads only). 0: densities as iterative
            pruning has them, which are better in very short trainings of networks with depthwise
            layers.
        densities: how dense layers are (two heads only): as AutoS has learned, or as ERK has them,
            without `reuse`. auto: learned, but where `choice` is auto, too, ERK's for networks
            `of_tokens` with the AutoS of the package, which has learned from one of them only.
        seed: of what is drawn.
        units: filled in from the selection (two heads only): what is drawn at units 0 says which
            units stay and how much layers keep, and it is drawn again inside of them.
    """
    if choice not in CHOICES:
        raise unknown("choice", choice, CHOICES)
    if densities not in DENSITIES:
        raise unknown("densities", densities, DENSITIES)
    network = load_scorer(scorer)
    device = next(iter(parameters.values())).device
    gradients = mean_gradients(model, parameters, batches, loss_fn)
    if network.head == "mean":
        return network.to(device).score(parameters, gradients)
    if choice == AUTO and units is None and of_tokens(model, parameters, batches):
        choice, densities = "random", densities_for_tokens(densities, network)
        note("of_tokens", {"choice": choice, "densities": densities})
    if densities == "erk":
        raw = {name: raw_density(weight.shape) for name, weight in parameters.items()}
    else:
        lift = use_lift(model, parameters, batches, reuse)
        raw = network.to(device).layer_densities(parameters, gradients, 1 - sparsity, lift)
    kept = counts(raw, parameters, sparsity)
    generator = torch.Generator().manual_seed(seed)
    noise = {name: noise_for(choice, weight, generator) for name, weight in parameters.items()}

    def drawn(count: Mapping[str, int], within: Masks | None = None) -> Masks:
        if choice == "random":
            return masks.keep_counts(noise, count, within=within)
        shape = paths.image_shape(model, batches)
        return reach.best_on_paths(model, noise, count, shape, within=within, tilt=TILT)

    chosen = drawn(kept)
    if units is None:
        return chosen
    votes = {name: mask.float() for name, mask in chosen.items()}
    quota = rooms(units, votes, chosen)
    note("units_left", [quota.left, quota.of])
    return drawn(quota.counts, quota.within)


def densities_for_tokens(asked: str, network: AutoS) -> str:
    """Return which densities networks `of_tokens` get: ERK's if the AutoS is the package's."""
    packaged = network.fingerprint == load_scorer(str(PRETRAINED)).fingerprint
    return asked if asked != AUTO else "erk" if packaged else "learned"


def use_lift(model, parameters, batches, reuse: float) -> dict[str, float] | None:
    """Return what `reuse` adds to the log-odds of each layer; None if that is nothing."""
    if not reuse:
        return None
    places = places_of(model, parameters, batches)
    return {name: reuse * math.log(count) for name, count in places.items()}


def places_of(model, parameters, batches) -> dict[str, float]:
    """Return at how many places of an image every layer's weights are used (see features.uses)."""
    first = next(iter(batches), None)
    image = torch.zeros(1, *paths.image_shape(model)) if first is None else first[0][:1]
    return features.uses(model, parameters, image.to(next(iter(parameters.values())).device))


def of_tokens(model, parameters, batches) -> bool:
    """Return whether it is a transformer: most layers that are used at several places are linear.

    More than three of four: where a block has a depthwise convolution to two linear layers, as in
    ConvNeXt, AutoS's densities are better than ERK's. Without linear layers that costs no pass.
    """
    linear = {name for name, weight in parameters.items() if weight.ndim == 2}
    if len(linear) * 4 <= len(parameters) * 3:
        return False
    places = places_of(model, parameters, batches)
    repeated = [name for name in parameters if places[name] > 1]
    return 4 * sum(name in linear for name in repeated) > 3 * len(repeated)


def counts(
    densities: Mapping[str, float], parameters: Mapping[str, Tensor], sparsity: float
) -> dict[str, int]:
    """Return the weights that layers keep: in proportion to their densities, exactly the budget."""
    sizes = {name: weight.numel() for name, weight in parameters.items()}
    return masks.allocate(densities, sizes, keep_count(sum(sizes.values()), sparsity))


def noise_for(choice: str, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Return random scores of a weight's shape: uniform, or for paths standard Gumbel noise.

    The highest of log(sum) + Gumbel noise are a draw in proportion to the sums (see reach.thinned).
    """
    uniform = torch.rand(weight.shape, generator=generator, device="cpu").to(weight.device)
    if choice == "random":
        return uniform
    return -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-7)))


def path_of(scorer: str | None) -> Path:
    """Return where an AutoS file is: as asked for, as the environment says, or the package's."""
    return Path(scorer or os.environ.get("AUTOSPARSE_SCORER") or PRETRAINED)


def load_scorer(scorer: str | None) -> AutoS:
    """Return the network of an AutoS file, by default the package's."""
    path = path_of(scorer)
    if not path.is_file():
        raise UsageError(
            f"no AutoS file at {path}; fit one with `autosparse fit` and name it in options.scorer"
        )
    return _loaded(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _loaded(path: Path, changed: int) -> AutoS:
    return AutoS.load(path)
