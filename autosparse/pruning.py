"""`prune`: from a model and data to a ticket."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autosparse import criteria, masks, models, paths, reach
from autosparse import data as data_module
from autosparse.config import (
    DataConfig,
    PruneConfig,
    ScoringConfig,
    check_sparsity,
    keep_count,
    plain,
)
from autosparse.data import DataSource
from autosparse.errors import RunFailed, UsageError, unknown
from autosparse.gradients import LossFn, Shared, counting
from autosparse.masks import Masks
from autosparse.models import device_of, prunable
from autosparse.steppers import Ranks
from autosparse.ticket import Ticket
from autosparse.training import seeded
from autosparse.versions import library_versions

Data = str | DataConfig | DataSource | Iterable[tuple[Tensor, Tensor]]
DENSE, UNIFORM = "dense", "uniform"
GUARDS = ("layer", "channel", "live", "none")
MODES = ("train", "eval")


@dataclass(frozen=True)
class Selection:
    """How scores become masks; see PruneConfig for the fields."""

    scope: str = "global"
    allocation: str | None = None
    allocation_options: dict[str, Any] = field(default_factory=dict)
    guard: str = "layer"
    pattern: str | None = None

    def check(self) -> None:
        """Raise UsageError for what cannot be."""
        if self.guard not in GUARDS:
            raise unknown("guard", self.guard, GUARDS)
        if self.scope not in masks.SCOPES:
            raise unknown("scope", self.scope, masks.SCOPES)
        if self.allocation is not None and self.allocation != UNIFORM:
            criteria.get(self.allocation).check(self.allocation_options)
        if self.allocation is not None and self.scope == "layer":
            raise UsageError(
                f"scope layer settles how much layers keep, and so does allocation "
                f"{self.allocation}; give one of them"
            )
        if self.pattern is not None:
            self.n_of_m()
            if self.allocation is not None or self.scope == "layer":
                raise UsageError(
                    "a pattern n:m settles how much layers keep; leave out scope and allocation"
                )
            if self.guard == "live":
                raise UsageError("a pattern n:m settles where weights may be; leave out guard live")

    def n_of_m(self) -> tuple[int, int]:
        """Return n and m of the pattern."""
        n, colon, m = (self.pattern or "").partition(":")
        if not (colon and n.isdecimal() and m.isdecimal() and 0 < int(n) <= int(m)):
            raise UsageError(f"a pattern is n:m with 0 < n <= m, such as 2:4, not {self.pattern!r}")
        return int(n), int(m)


def prune(
    model: nn.Module,
    data: Data,
    criterion: str = "autos",
    sparsity: float = 0.95,
    *,
    selection: Selection | None = None,
    scoring: ScoringConfig | None = None,
    scope: str = "global",
    seed: int = 0,
    options: dict[str, Any] | None = None,
    exclude: Sequence[str] = (),
    loss_fn: LossFn = nn.functional.cross_entropy,
    ranks: Ranks | None = None,
) -> Ticket:
    """Score a model's weights at initialization and return the ticket; the model is not changed.

    Args:
        model: a timm model (or any module with Conv and Linear layers), at initialization.
        data: a data set's name or config, a DataSource, or batches of (normalised images,
            labels), e.g. a DataLoader; all of those batches are used, so give few. Criteria that
            look at no data take [].
        criterion: a name from `criteria.names()`, or `dense` to keep everything.
        sparsity: fraction of prunable weights to remove, 0 <= sparsity < 1.
        selection: how scores become masks; by default a global threshold.
        scoring: what scores are computed on, and in which mode; the amounts for named data.
        scope: `layer` is short for a selection of that scope.
        seed: chooses the images that are scored, and what random criteria draw.
        options: the criterion's own options.
        exclude: patterns of weights to leave dense, such as `head` (see `models.prunable`).
        loss_fn: (outputs, labels) -> mean loss.
        ranks: this process's place, if several prune the same model together (under
            torch.distributed): named data are shared out, own batches are taken to be this
            rank's share; every rank gets the same ticket.

    Raises UsageError for an unknown name or a sparsity out of range.
    """
    if criterion == DENSE:
        return _dense(model, data, exclude, seed)
    selection = selection or Selection()
    if scope != "global":
        selection = replace(selection, scope=scope)
    scores, card = score(
        model, data, criterion, sparsity, selection=selection,
        scoring=scoring, seed=seed, options=options, exclude=exclude, loss_fn=loss_fn, ranks=ranks,
    )  # fmt: skip
    return choose(model, scores, card, ranks=ranks)


def prune_as(config: PruneConfig, *, ranks: Ranks | None = None) -> Ticket:
    """Make the model that a config names and prune it as it says."""
    source = data_module.load(config.data)
    model = models.create_for(source, config.model, config.seed)
    selection = Selection(
        config.scope,
        config.allocation,
        config.allocation_options,
        config.guard,
        config.pattern,
    )
    return prune(
        model.to(models.choose_device(config.device)),
        source,
        config.criterion,
        config.sparsity,
        selection=selection,
        scoring=config.scoring,
        seed=config.seed,
        options=config.options,
        ranks=ranks,
    )


@dataclass(frozen=True)
class Scored:
    """Scores, how many weights each layer is to keep if that is given, and how to choose."""

    scores: dict[str, Tensor]
    counts: dict[str, int] | None
    """Per layer, where another criterion allocates."""
    selection: Selection
    shape: tuple[int, ...] | None
    """[C, H, W] of an image, where it is known."""


def score(
    model: nn.Module,
    data: Data,
    criterion: str,
    sparsity: float,
    *,
    selection: Selection,
    scoring: ScoringConfig | None = None,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    exclude: Sequence[str] = (),
    loss_fn: LossFn = nn.functional.cross_entropy,
    ranks: Ranks | None = None,
) -> tuple[Scored, dict[str, Any]]:
    """Do the first half of `prune`: return scores, and the card that the ticket will have."""
    selection.check()
    scoring, asked = scoring or ScoringConfig(), dict(options or {})
    if scoring.mode not in MODES:
        raise unknown("mode", scoring.mode, MODES)
    if selection.pattern is not None:
        n, m = selection.n_of_m()
        sparsity = 1 - n / m
    check_sparsity(sparsity)
    found = criteria.get(criterion)
    found.check(asked)
    exclude = _excluded(model, exclude)
    source: Any = data_module.load(data) if isinstance(data, str | DataConfig) else data
    others = [] if selection.allocation in (None, UNIFORM) else [criteria.get(selection.allocation)]
    if not isinstance(source, DataSource):
        source = _held(source, [found, *others])
    if ranks is not None and ranks.world_size > 1:
        _same_everywhere(_state_hash(model), "holds another model", ranks)
    context = _Context(model, source, scoring, seed, exclude, loss_fn, ranks or Ranks())
    started = time.perf_counter()
    with counting() as cost:
        scores = context.run(found, sparsity, asked)
        counts = context.allocated(selection, scores, sparsity)
    card = {
        **_describe(model, source),
        "criterion": criterion,
        "options": asked,
        "sparsity": sparsity,
        "selection": plain(selection),
        "scoring": plain(scoring),
        "seed": seed,
        "exclude": list(exclude),
        **(found.provenance(**asked) if found.provenance else {}),
        "image_passes": round(cost.image_passes, 3),
        "seconds": round(time.perf_counter() - started, 3),
        "versions": library_versions(),
    }
    return Scored(scores, counts, selection, context.shape()), card


def choose(
    model: nn.Module, scored: Scored, card: dict[str, Any], *, ranks: Ranks | None = None
) -> Ticket:
    """Do the second half of `prune`: from scores to the ticket."""
    chosen = select(scored, card["sparsity"])
    if scored.selection.guard == "live":
        chosen = _onto_paths(model, chosen, scored)
    ticket = Ticket.from_model(model, chosen, finish_card(model, chosen, scored.shape, card))
    if ranks is not None and ranks.world_size > 1:
        _same_everywhere(ticket.fingerprint, "chose other weights", ranks)
    return ticket


def select(scored: Scored, sparsity: float) -> Masks:
    """Return the masks: exactly the right number of weights, the highest scores."""
    selection, scores = scored.selection, scored.scores
    per_channel = selection.guard == "channel"
    if selection.pattern is not None:
        return masks.n_of_m(scores, *selection.n_of_m())
    if scored.counts is not None:
        return masks.keep_counts(scores, scored.counts, per_channel=per_channel)
    return masks.from_scores(
        scores,
        sparsity,
        scope=selection.scope,
        min_per_layer=0 if selection.guard == "none" else 1,
        per_channel=per_channel,
    )


def _onto_paths(model: nn.Module, chosen: Masks, scored: Scored) -> Masks:
    if scored.shape is None:
        raise UsageError("guard live needs to know the images' shape: prune with named data")
    try:
        return reach.onto_paths(model, chosen, scored.scores, scored.shape)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UsageError(
            f"guard live: the paths through {type(model).__name__} cannot be followed ({error}); "
            "use guard layer"
        ) from error


def finish_card(
    model: nn.Module, chosen: Masks, shape: tuple[int, ...] | None, card: Mapping[str, Any]
) -> dict[str, Any]:
    """Add to a card what the masks came to: sparsity, and the weights on a live path."""
    total = masks.total(chosen)
    card = {**card, "sparsity": card["sparsity"], "kept": masks.kept(chosen)}
    if card.get("selection", {}).get("pattern"):
        card["sparsity"] = masks.sparsity(chosen)
    live = _live(model, chosen, shape)
    if live is not None:
        card["live"] = {name: int(mask.count_nonzero()) for name, mask in live.items()}
        card["effective_density"] = sum(card["live"].values()) / total
    return card


def _live(model: nn.Module, chosen: Masks, shape: tuple[int, ...] | None) -> Masks | None:
    if shape is None:
        return None
    try:
        return reach.live(model, chosen, shape)
    except (RuntimeError, TypeError, AttributeError) as error:
        warnings.warn(
            f"effective density of {type(model).__name__} is not known: {error}", stacklevel=2
        )
        return None


def _dense(model: nn.Module, data: Data, exclude: Sequence[str], seed: int) -> Ticket:
    exclude = _excluded(model, exclude)
    if isinstance(data, str | DataConfig):
        data = data_module.load(data)
    chosen = {
        name: torch.ones_like(weight, dtype=torch.bool)
        for name, weight in prunable(model, exclude).items()
    }
    card = {
        **_describe(model, data),
        "criterion": DENSE,
        "options": {},
        "sparsity": 0.0,
        "seed": seed,
        "exclude": list(exclude),
        "image_passes": 0.0,
        "seconds": 0.0,
        "versions": library_versions(),
    }
    return Ticket.from_model(model, chosen, card)


def _excluded(model: nn.Module, exclude: Sequence[str]) -> tuple[str, ...]:
    return tuple(exclude) or tuple(getattr(model, "autosparse_recipe", {}).get("exclude", ()))


@dataclass(frozen=True)
class _Context:
    """What several criteria that score the same model have in common."""

    model: nn.Module
    data: DataSource | Iterable[tuple[Tensor, Tensor]]
    scoring: ScoringConfig
    seed: int
    exclude: Sequence[str]
    loss_fn: LossFn
    ranks: Ranks

    def run(
        self, criterion: criteria.Criterion, sparsity: float, options: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Return the criterion's scores; `sparsity` and `seed` are filled in where it has them."""
        known = {"sparsity": sparsity, "seed": self.seed}
        usual = {key: value for key, value in known.items() if key in criterion.options}
        with seeded(self.seed):
            scores = criterion(
                self.model,
                self._batches(criterion, usual | options),
                self.loss_fn,
                exclude=self.exclude,
                training_mode=self.scoring.mode == "train",
                warm_up=self.scoring.warm_up,
                **usual | options,
            )
        if self.ranks.world_size > 1:  # Of steps and passes that differ in the last bit, say.
            for name in scores:
                scores[name] = scores[name].contiguous()
                dist.broadcast(scores[name], 0)
        return scores

    def allocated(
        self, selection: Selection, scores: Mapping[str, Tensor], sparsity: float
    ) -> dict[str, int] | None:
        """Return how much each layer keeps, if another criterion says so."""
        if selection.allocation is None:
            return None
        least = masks.least_of(
            scores, 0 if selection.guard == "none" else 1, selection.guard == "channel"
        )
        sizes = {name: each.numel() for name, each in scores.items()}
        total = keep_count(sum(sizes.values()), sparsity)
        if selection.allocation == UNIFORM:
            return masks.allocate(dict.fromkeys(sizes, 1.0), sizes, total, least)
        other = criteria.get(selection.allocation)
        theirs = self.run(other, sparsity, selection.allocation_options)
        chosen = masks.keep(
            theirs, total, min_per_layer=0 if selection.guard == "none" else 1,
            per_channel=selection.guard == "channel",
        )  # fmt: skip
        return {name: int(mask.count_nonzero()) for name, mask in chosen.items()}

    def shape(self) -> tuple[int, ...] | None:
        """Return an image's [C, H, W], where data or model tell."""
        if isinstance(self.data, DataSource):
            return self.data.in_chans, self.data.image_size, self.data.image_size
        try:
            return paths.image_shape(self.model, self.data)
        except UsageError:
            return None

    def _batches(
        self, criterion: criteria.Criterion, options: Mapping[str, Any]
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """Return what is scored; if no data are needed, one batch, which shows their shape."""
        device, scoring, data = device_of(self.model), self.scoring, self.data
        if isinstance(data, DataSource):
            data = data.to(device)
            if criterion.trains:
                size = options.get("batch_size", criterion.options["batch_size"])
                return data.training_batches(size, self.seed)
            if not criterion.needs_data:
                return data.score_batches(1, seed=self.seed)
            images = scoring.samples_per_class * data.num_classes
            found = data.score_batches(
                scoring.samples_per_class,
                seed=self.seed,
                batches=scoring.batches,
                batch_size=min(scoring.batch_size, -(-images // self.ranks.world_size)),
            )
            if self.ranks.world_size == 1:
                return found
            return Shared(found[self.ranks.rank :: self.ranks.world_size])
        if criterion.trains:
            return data
        chosen = data if criterion.needs_data else islice(data, 1)
        here = [(images.to(device), labels.to(device)) for images, labels in chosen]
        return Shared(here) if self.ranks.world_size > 1 and criterion.needs_data else here


def _held(data: Any, used: list[criteria.Criterion]) -> Any:
    """Return batches that can be looked at more than once, and no more of them than needed."""
    if any(criterion.trains for criterion in used):
        return list(data) if iter(data) is data else data
    if any(criterion.needs_data for criterion in used):
        return list(data)
    return list(islice(data, 1))


def _same_everywhere(mine: str, what: str, ranks: Ranks) -> None:
    """Raise RunFailed on every rank unless all say the same."""
    everyone: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise RunFailed(
                f"rank {rank}: {what} ({theirs}) than rank 0 ({everyone[0]}); build the same "
                "model from the same seed on every rank"
            )


def _state_hash(model: nn.Module) -> str:
    """Return 16 hex digits of a model's whole state."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


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
