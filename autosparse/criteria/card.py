"""The card of a ticket: what it says of model, data, criterion and outcome."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from torch import Tensor, nn

from autosparse.core.config import plain
from autosparse.core.errors import RunFailed
from autosparse.core.versions import library_versions
from autosparse.data.sets import DataSource
from autosparse.sparsity import masks, reach
from autosparse.sparsity.masks import Masks
from autosparse.sparsity.paths import CannotFollow


def plain_values(value: Any) -> Any:
    """Return a setting as a file can hold it: paths as text, numbers of NumPy as plain ones."""
    if isinstance(value, Mapping):
        return {key: plain_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(each) for each in value]
    if isinstance(value, PurePath):
        return str(value)
    return value.item() if isinstance(value, np.generic) else value


def begin_card(
    model: nn.Module,
    data: DataSource | Iterable[tuple[Tensor, Tensor]],
    *,
    criterion: str,
    options: Mapping[str, Any],
    sparsity: float,
    seed: int,
    exclude: Sequence[str],
    image_passes: float = 0.0,
    seconds: float = 0.0,
) -> dict[str, Any]:
    """Return what every ticket's card begins with."""
    card = {"model": getattr(model, "autosparse_recipe", {"class": type(model).__name__})}
    if isinstance(data, DataSource):
        card["data"] = plain(data.config)
        card["data_fingerprint"] = data.fingerprint
        card["normalisation"] = data.normalisation()
    else:
        card["data"] = {"name": "batches"}
    return card | {
        "criterion": criterion,
        "options": plain_values(options),
        "sparsity": plain_values(sparsity),
        "seed": plain_values(seed),
        "exclude": list(exclude),
        "image_passes": round(image_passes, 3),
        "seconds": round(seconds, 3),
        "versions": library_versions(),
    }


def finish_card(
    model: nn.Module, chosen: Masks, shape: tuple[int, ...] | None, card: Mapping[str, Any]
) -> dict[str, Any]:
    """Add to a card what the masks came to: sparsity, the weights on a live path, and `dead`.

    `dead` is the first layer from which on nothing depends on the image, where the ticket's output
    does not; a warning says so too. `paths` says why it is not known how much lies on a path.

    Args:
        model: dense.
        chosen: the masks.
        shape: [C, H, W] of an image; None, if it is not known: then paths are not looked at.
        card: so far.
    """
    card = {**card, "sparsity": card["sparsity"], "kept": masks.kept(chosen)}
    if card.get("selection", {}).get("pattern"):
        card["sparsity"] = masks.sparsity(chosen)
    if shape is None:
        return card
    try:
        live = reach.live(model, chosen, shape)
        if not masks.kept(live):
            card["dead"] = reach.first_dead(model, chosen, shape)
            warnings.warn(dead_line(card), stacklevel=2)
    except CannotFollow as error:
        card["paths"] = f"cannot be followed: {error}"
        warnings.warn(
            f"effective density of {type(model).__name__} is not known: {error}", stacklevel=2
        )
        return card
    card["live"] = masks.counts(live)
    card["effective_density"] = masks.kept(live) / masks.total(chosen)
    return card


def dead_line(card: Mapping[str, Any]) -> str:
    """Return the warning for a dead ticket."""
    return (
        f"this ticket is dead: its output does not depend on the image, from {card['dead']} on; "
        "prune at a lower sparsity, by another criterion or, if that gives scores, with guard live"
    )


def refuse_dead(card: Mapping[str, Any]) -> None:
    """Raise RunFailed for a dead ticket."""
    if "dead" in card:
        raise RunFailed(dead_line(card))
