"""`prune`: from a model and data to a ticket."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from autosparse import criteria, masks
from autosparse import data as data_module
from autosparse.config import DataConfig, check_sparsity, plain
from autosparse.data import DataSource
from autosparse.gradients import LossFn
from autosparse.models import device_of, prunable
from autosparse.ticket import Ticket
from autosparse.versions import library_versions

Data = str | DataConfig | DataSource | Iterable[tuple[Tensor, Tensor]]
DENSE = "dense"


def prune(
    model: nn.Module,
    data: Data,
    criterion: str = "autos",
    sparsity: float = 0.95,
    *,
    scope: str = "global",
    seed: int = 0,
    options: dict[str, Any] | None = None,
    exclude: Sequence[str] = (),
    samples_per_class: int = 10,
    loss_fn: LossFn = nn.functional.cross_entropy,
) -> Ticket:
    """Score a model's weights at initialization and return the ticket; the model is not changed.

    Args:
        model: a timm model (or any module with Conv and Linear layers), at initialization.
        data: a data set's name or config, a DataSource, or batches of (normalised images,
            labels), e.g. a DataLoader; all of those batches are used, so give few. Criteria that
            look at no data take [].
        criterion: a name from `criteria.names()`, or `dense` to keep everything.
        sparsity: fraction of prunable weights to remove, 0 <= sparsity < 1.
        scope: `global` compares all weights, `layer` prunes every layer alike.
        seed: chooses the images that are scored, and what random criteria draw.
        options: the criterion's own options.
        exclude: patterns of weights to leave dense, such as `head` (see `models.prunable`).
        samples_per_class: images per class that are scored, for named data.
        loss_fn: (outputs, labels) -> mean loss.

    Raises UsageError for an unknown name or a sparsity out of range.
    """
    check_sparsity(sparsity)
    exclude = tuple(exclude) or tuple(getattr(model, "autosparse_recipe", {}).get("exclude", ()))
    if isinstance(data, str | DataConfig):
        data = data_module.load(data)
    started = time.perf_counter()
    asked = dict(options or {})
    if criterion == DENSE:
        sparsity, provenance = 0.0, {}
        chosen = {
            name: torch.ones_like(weight, dtype=torch.bool)
            for name, weight in prunable(model, exclude).items()
        }
    else:
        found = criteria.get(criterion)
        batches = _batches(data, found.needs_data, samples_per_class, seed, device_of(model))
        usual = _filled(found, sparsity, seed)
        scores = found(model, batches, loss_fn, exclude=exclude, **usual | asked)
        chosen = masks.from_scores(scores, sparsity, scope=scope)
        provenance = found.provenance(**asked) if found.provenance else {}
    card = {
        **_describe(model, data),
        "criterion": criterion,
        "options": asked,
        "sparsity": sparsity,
        "scope": scope,
        "seed": seed,
        "exclude": list(exclude),
        "samples_per_class": samples_per_class,
        **provenance,
        "seconds": round(time.perf_counter() - started, 3),
        "versions": library_versions(),
    }
    return Ticket.from_model(model, chosen, card)


def _batches(
    data: DataSource | Iterable[tuple[Tensor, Tensor]],
    needed: bool,
    samples_per_class: int,
    seed: int,
    device: torch.device,
) -> list[tuple[Tensor, Tensor]]:
    """Return what is scored; if no data are needed, one batch, which shows the images' shape."""
    if isinstance(data, DataSource):
        data = data.to(device).score_batches(samples_per_class if needed else 1, seed=seed)
    chosen = data if needed else islice(data, 1)
    return [(images.to(device), labels.to(device)) for images, labels in chosen]


def _filled(criterion: criteria.Criterion, sparsity: float, seed: int) -> dict[str, Any]:
    """Return those of sparsity and seed that are options of the criterion."""
    known = {"sparsity": sparsity, "seed": seed}
    return {key: value for key, value in known.items() if key in criterion.options}


def _describe(
    model: nn.Module, data: DataSource | Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """Return the card's entries on model and data."""
    recipe = getattr(model, "autosparse_recipe", {"class": type(model).__name__})
    if isinstance(data, DataSource):
        return {
            "model": recipe,
            "data": plain(data.config),
            "data_fingerprint": data.fingerprint,
        }
    return {"model": recipe, "data": {"name": "batches"}}
