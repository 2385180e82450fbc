"""`prune`: from a model and data to a ticket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import islice
from typing import Any

from torch import nn

from autosparse import criteria
from autosparse.core.errors import UsageError, unknown
from autosparse.criteria.card import begin_card, finish_card, refuse_dead
from autosparse.criteria.config import PruneConfig, ScoringConfig
from autosparse.criteria.own_models import check_runs
from autosparse.criteria.scoring import Data, check_scoring, excluded, same_everywhere, score
from autosparse.criteria.selection import (
    UNIFORM,
    Scored,
    Selection,
    into_units,
    onto_paths,
    select,
    tie_entry,
)
from autosparse.data import sets
from autosparse.data.config import DataConfig
from autosparse.models import zoo
from autosparse.models.config import ModelConfig
from autosparse.models.contract import Checked, gradients_on
from autosparse.models.gradients import LossFn
from autosparse.sparsity import masks
from autosparse.sparsity.counts import check_sparsity
from autosparse.sparsity.ticket import Ticket
from autosparse.training.steppers import Ranks

DENSE = "dense"
SOME_CLASSES = 10
"""Classes of the model that settings are checked on, where only the data say how many: any number
will do."""
DEAD = ("warn", "error")
"""What `dead` may say."""


@gradients_on()
def prune(
    model: nn.Module,
    data: Data,
    criterion: str = "autos",
    sparsity: float = 0.95,
    *,
    selection: Selection | None = None,
    scoring: ScoringConfig | None = None,
    scope: str = "global",
    units: float = 0.0,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    exclude: Sequence[str] = (),
    loss_fn: LossFn = nn.functional.cross_entropy,
    ranks: Ranks | None = None,
    dead: str = "warn",
) -> Ticket:
    """Choose a model's weights at initialization and return the ticket; the model is not changed.

    In a model of your own, parameters that start near zero hide layers from the scores; they get
    other values while it is scored, and the card names them (`revealed`).

    Args:
        model: a timm model (or any module with Conv and Linear layers), at initialization. A
            compiled or parallel one is looked into: the ticket is for the plain model.
        data: a data set's name or config, a DataSource, or batches of (normalised images, labels),
            e.g. a DataLoader; all of these are used, so give few. Criteria without data take [].
        criterion: a name from `criteria.names()`, or `dense` to keep everything.
        sparsity: fraction of prunable weights to remove, 0 <= sparsity < 1.
        selection: how scores become masks; by default a global threshold. Criteria that choose
            by themselves take no other.
        scoring: what scores are computed on, and in which mode; the amounts for named data.
        scope: `layer` is short for a selection of that scope.
        units: short for a selection with units: 0 chooses weights one by one, 1 whole units with
            the same number of weights (see criteria/units.py).
        seed: chooses the images that are scored, and what random criteria draw.
        options: the criterion's own options.
        exclude: patterns of weights to leave dense, such as `head` (see `models.prunable`).
        loss_fn: (outputs, labels) -> mean loss; the outputs may be of any type that it takes.
        ranks: this process's place, if several prune one model together (torch.distributed): named
            data are shared out, own batches are this rank's share; all get the same ticket.
        dead: `warn` or `error`, if the ticket's output does not depend on the image.

    Works under `torch.no_grad` and `inference_mode` too. Raises UsageError for an unknown name, a
    setting out of range, and a model, loss or batch that cannot be used; RunFailed for a dead
    ticket where `dead` is `error`.
    """
    if dead not in DEAD:
        raise unknown("value of dead", dead, DEAD)
    model = zoo.unwrapped(model)
    zoo.check_values(model)
    selection = selection or Selection()
    if scope != "global":
        selection = replace(selection, scope=scope)
    if units:
        selection = replace(selection, units=units)
    if criterion == DENSE:
        _refuse_units(selection)
        return _dense(model, data, exclude, seed)
    scored, begun = score(
        model, data, criterion, sparsity, selection=selection,
        scoring=scoring, seed=seed, options=options, exclude=exclude, loss_fn=loss_fn, ranks=ranks,
    )  # fmt: skip
    ticket = choose(model, scored, begun, ranks=ranks)
    if dead == "error":
        refuse_dead(ticket.card)
    return ticket


def prune_as(config: PruneConfig, *, ranks: Ranks | None = None) -> Ticket:
    """Make the model that a config names and prune it as it says."""
    source = sets.load(config.data)
    model = zoo.create_for(source, config.model, config.seed)
    return prune(
        model.to(zoo.choose_device(config.device)),
        source,
        config.criterion,
        config.sparsity,
        selection=selection_of(config),
        scoring=config.scoring,
        seed=config.seed,
        options=config.options,
        ranks=ranks,
        dead=config.dead,
    )


def _refuse_units(selection: Selection) -> None:
    if selection.units:
        raise UsageError(f"{DENSE} keeps every weight, so units {selection.units:g} does not apply")


def check(config: PruneConfig) -> None:
    """Raise UsageError for all that the settings alone show to be wrong, before work begins."""
    zoo.choose_device(config.device)
    check_sparsity(config.sparsity)
    selection_of(config).check()
    for name, options in criteria_of(config):
        criteria.get(name).check_whole(options, filled=("sparsity", "seed"))
    if config.criterion == DENSE:
        _refuse_units(selection_of(config))
    else:
        selection_of(config).check_for(criteria.get(config.criterion), config.options)
    check_scoring(config.scoring)
    check_model(config.model, config.data)


def criteria_of(config: PruneConfig) -> list[tuple[str, dict[str, Any]]]:
    """Return the criteria that are used, with their options: the main one, and the allocator."""
    used = [(config.criterion, config.options)] if config.criterion != DENSE else []
    if config.allocation not in (None, UNIFORM):
        used.append((str(config.allocation), config.allocation_options))
    return used


def check_model(model: ModelConfig, data: DataConfig) -> nn.Module:
    """Return the model for some data, without values; raise UsageError where it cannot be."""
    shape = sets.shape(data)
    return zoo.check(
        model,
        num_classes=shape.num_classes or SOME_CLASSES,
        in_chans=shape.in_chans,
        image_size=shape.image_size,
    )


def selection_of(config: PruneConfig) -> Selection:
    """Return how scores become masks."""
    return Selection(**{each.name: getattr(config, each.name) for each in fields(Selection)})


def choose(
    model: nn.Module, scored: Scored, begun: dict[str, Any], *, ranks: Ranks | None = None
) -> Ticket:
    """Do the second half of `prune`: from scores or masks, and the card so far, to the ticket."""
    chosen = scored.masks
    if chosen is None:
        chosen = select(scored, begun["sparsity"])
        begun = {**begun, **tie_entry(scored, chosen)}
        within = None
        if scored.dial is not None:
            chosen, quota = into_units(chosen, scored, scored.dial)
            within, begun = quota.within, {**begun, "units_left": [quota.left, quota.of]}
        if scored.selection.guard == "live":
            chosen = onto_paths(model, chosen, scored, within)
    whole = finish_card(model, chosen, scored.shape, begun)
    ticket = Ticket.from_model(model, chosen, whole)
    if ranks is not None and ranks.world_size > 1:
        same_everywhere(ticket.fingerprint, "chose other weights", ranks)
    return ticket


def _dense(model: nn.Module, data: Data, exclude: Sequence[str], seed: int) -> Ticket:
    exclude = excluded(model, exclude)
    whole = masks.dense(zoo.prunable(model, exclude))
    if isinstance(data, str | DataConfig):
        data = sets.load(data)
    data = data if isinstance(data, sets.DataSource) else list(islice(Checked(data, None), 1))
    check_runs(model, data)
    begun = begin_card(
        model, data, criterion=DENSE, options={}, sparsity=0.0, seed=seed, exclude=exclude
    )
    return Ticket.from_model(model, whole, begun)
