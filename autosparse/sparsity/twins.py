"""Twins of a ticket: as many weights, but another mask or other values, as controls.

Method: J. Frankle et al., Pruning Neural Networks at Initialization: Why Are We Missing the Mark?
(ICLR 2021), arXiv 2009.08576. If a ticket is no better than its shuffled twin, only its
layer densities were worth something.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from autosparse.core.errors import UsageError
from autosparse.models import zoo
from autosparse.sparsity import masks
from autosparse.sparsity.masks import Masks
from autosparse.sparsity.ticket import Ticket

SHUFFLED, REINITIALISED, INVERTED = "shuffled", "reinitialised", "inverted"
TWINS = {
    SHUFFLED: "the mask permuted at random inside each layer, initial weights as they were",
    REINITIALISED: "the same mask on weights drawn anew",
    INVERTED: "as many weights of each layer, those with the lowest scores",
}
SALT = 7_368_787
"""Any large number: keeps a twin's draws apart from those of the ticket's own seed."""


def shuffled(chosen: Mapping[str, Tensor], seed: int) -> Masks:
    """Permute every mask inside its layer; each keeps as many weights as before."""
    generator = torch.Generator().manual_seed(seed * SALT + 1)
    permuted = {}
    for name, mask in chosen.items():
        order = torch.randperm(mask.numel(), generator=generator, device="cpu")
        permuted[name] = mask.cpu().flatten()[order].view(mask.shape)
    return permuted


def inverted(scores: Mapping[str, Tensor], chosen: Mapping[str, Tensor]) -> Masks:
    """Keep the lowest scores instead of the highest, as many in each layer."""
    opposite = {name: -score for name, score in scores.items()}
    return masks.keep_counts(opposite, masks.counts(chosen))


def survival_scores(survival: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return IRP's survival as scores, ties broken by chance (positions would make patterns)."""
    generator = torch.Generator().manual_seed(seed * SALT + 2)
    return {
        name: levels.float() + torch.rand(levels.shape, generator=generator, device="cpu")
        for name, levels in survival.items()
    }


def shuffled_twin(ticket: Ticket, model: nn.Module) -> Ticket:
    """Return the ticket with its masks shuffled; `model` holds the dense values it starts from."""
    card = _card(ticket, SHUFFLED)
    return Ticket.from_model(model, shuffled(ticket.masks, card["seed"]), card)


def inverted_twin(ticket: Ticket, model: nn.Module, scores: Mapping[str, Tensor]) -> Ticket:
    """Return the ticket of the lowest scores; `model` holds the dense values it starts from."""
    return Ticket.from_model(model, inverted(scores, ticket.masks), _card(ticket, INVERTED))


def reinitialised_twin(ticket: Ticket) -> Ticket:
    """Return the same masks on a model that is initialised from another seed."""
    recipe = ticket.card.get("model", {})
    if "seed" not in recipe:
        raise UsageError("the ticket does not say how its model was initialised")
    other = {**recipe, "seed": recipe["seed"] * SALT + 3}
    card = {**_card(ticket, REINITIALISED), "model": other}
    return Ticket.from_model(zoo.from_recipe(other), ticket.masks, card)


def _card(ticket: Ticket, twin: str) -> dict:
    """Return the ticket's card as the twin's, without the entries on the ticket's own mask."""
    own = ["live", "effective_density"]
    if twin != REINITIALISED:
        own += ["dead", "units_left"]
    kept = {key: value for key, value in ticket.card.items() if key not in own}
    return {**kept, "twin": twin, "twin_of": ticket.fingerprint, "seed": kept.get("seed", 0)}
