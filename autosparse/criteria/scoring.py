"""Run a criterion on a model: its scores or masks, and the ticket's card so far."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autosparse import criteria
from autosparse.core.config import plain
from autosparse.core.errors import RunFailed, UsageError, UserError, unknown
from autosparse.core.ranges import check_ranges
from autosparse.criteria import own_models
from autosparse.criteria.base import as_on_rank_0
from autosparse.criteria.card import begin_card, plain_values
from autosparse.criteria.config import ScoringConfig
from autosparse.criteria.selection import UNIFORM, Scored, Selection, dial_of
from autosparse.criteria.units import Dial
from autosparse.data import sets
from autosparse.data.config import DataConfig
from autosparse.data.sets import DataSource
from autosparse.models import roles, zoo
from autosparse.models.contract import Checked, gradients_on, of_the_machine
from autosparse.models.gradients import LossFn, Shared, counting, note
from autosparse.models.zoo import device_of
from autosparse.sparsity import masks, paths
from autosparse.sparsity.counts import check_sparsity, keep_count
from autosparse.sparsity.masks import Masks
from autosparse.sparsity.paths import CannotFollow
from autosparse.training.loop import seeded
from autosparse.training.steppers import Ranks

Data = str | DataConfig | DataSource | Iterable[tuple[Tensor, Tensor]]
MODES = ("train", "eval")


@gradients_on()
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
    """Do the first half of `prune`: return scores or masks, and the card of the ticket."""
    selection.check()
    model = zoo.unwrapped(model)
    zoo.check_values(model)
    scoring, asked = scoring or ScoringConfig(), plain_values(options or {})
    sparsity = plain_values(sparsity)
    check_scoring(scoring)
    if selection.pattern is not None:
        n, m = selection.n_of_m()
        sparsity = 1 - n / m
    check_sparsity(sparsity)
    main = criteria.get(criterion)
    main.check_asked(asked)
    selection.check_for(main, asked)
    exclude = excluded(model, exclude)
    prunable = zoo.prunable(model, exclude)
    source: Any = sets.load(data) if isinstance(data, str | DataConfig) else data
    others = [] if selection.allocation in (None, UNIFORM) else [criteria.get(selection.allocation)]
    if not isinstance(source, DataSource):
        source = _held(source, [main, *others], _classes(model, loss_fn))
    if ranks is not None and ranks.world_size > 1:
        same_everywhere(_state_hash(model), "holds another model", ranks)
    if selection.units or not main.needs_data:
        own_models.check_runs(model, source)
    context = _Context(model, source, scoring, seed, exclude, loss_fn, ranks or Ranks())
    started = time.perf_counter()
    dial = None
    if selection.units:  # Only then a batch is read for its shape.
        dial = dial_of(model, selection, prunable, context.shape())
    with counting() as cost:
        scored = context.scored(main, asked, sparsity, selection, dial)
    changed = main.changed_defaults(asked)
    begun = begin_card(
        model, source, criterion=criterion, options=asked, sparsity=sparsity, seed=seed,
        exclude=exclude, image_passes=cost.image_passes, seconds=time.perf_counter() - started,
    )  # fmt: skip
    return scored, {
        **begun,
        "device": zoo.device_name(zoo.device_of(model)),
        **({"changed_defaults": changed} if changed else {}),
        "selection": plain_values(plain(selection)),
        "scoring": plain(scoring),
        **(main.provenance(**asked) if main.provenance else {}),
        **cost.notes,
    }


def check_scoring(scoring: ScoringConfig) -> None:
    """Raise UsageError for settings that cannot be."""
    if scoring.mode not in MODES:
        raise unknown("mode", scoring.mode, MODES)
    check_ranges(
        scoring, dict.fromkeys(("samples_per_class", "batches", "batch_size"), "at least 1")
    )


@dataclass(frozen=True)
class _Context:
    """One model and its data, for the main criterion and the one that allocates."""

    model: nn.Module
    data: DataSource | Iterable[tuple[Tensor, Tensor]]
    scoring: ScoringConfig
    seed: int
    exclude: Sequence[str]
    loss_fn: LossFn
    ranks: Ranks

    def scored(
        self,
        criterion: criteria.Criterion,
        options: dict[str, Any],
        sparsity: float,
        selection: Selection,
        dial: Dial | None,
    ) -> Scored:
        """Return what the criterion says, and how much each layer keeps if another allocates."""
        returned = self.run(criterion, sparsity, options, dial if criterion.takes_units else None)
        if criterion.makes_choice(options):
            return Scored({}, None, selection, self.shape(), returned)
        _warn_of_level_scores(returned, criterion.name, sparsity)
        counts = self.allocated(selection, returned, sparsity)
        return Scored(returned, counts, selection, self.shape(), dial=dial)

    def run(
        self,
        criterion: criteria.Criterion,
        sparsity: float,
        options: dict[str, Any],
        dial: Dial | None = None,
    ) -> criteria.Scores | Masks:
        """Return scores or masks; `sparsity` and `seed` are filled in where it has them."""
        known = {"sparsity": sparsity, "seed": self.seed}
        usual = {key: value for key, value in known.items() if key in criterion.options}
        with seeded(self.seed), self._revealed(criterion), self._explained(criterion):
            scores = criterion(
                self.model,
                self._batches(criterion, usual | options),
                self.loss_fn,
                exclude=self.exclude,
                training_mode=self.scoring.mode == "train",
                warm_up=self.scoring.warm_up,
                dial=dial,
                **usual | options,
            )
        if self.ranks.world_size > 1:
            as_on_rank_0(scores)
        return scores

    @contextmanager
    def _revealed(self, criterion: criteria.Criterion) -> Iterator[None]:
        """Inside, no parameter hides layers from the scores; see zoo.revealing.

        Models of `zoo.create` are scored as they are: `zero_init` is their setting for that.
        """
        shape = self.shape()
        if shape is None or hasattr(self.model, "autosparse_recipe"):
            yield
            return
        image = own_models.ones(self.model, shape)
        limit = 0.0 if criterion.learned else roles.FAINT
        try:
            with torch.random.fork_rng(devices=[]):
                values = zoo.revealing(self.model, image, limit)
        except Exception as error:
            if of_the_machine(error) or isinstance(error, UserError):
                raise
            if criterion.needs_data:
                raise UsageError(own_models.own_failure(self.model, shape, error)) from error
            values = {}  # The criterion does not call the model; what does reports the error.
        if values:
            note("revealed", sorted(values))
        with roles.replaced(self.model, values):
            yield

    @contextmanager
    def _explained(self, criterion: criteria.Criterion) -> Iterator[None]:
        """Turn CannotFollow into one line: the criterion needs paths that cannot be followed."""
        try:
            yield
        except CannotFollow as error:
            self._check_forward()
            name = type(self.model).__name__
            raise UsageError(
                f"{criterion.name} has no scores for {name}, whose paths cannot be followed "
                f"({error}); use a criterion that needs none, such as snip"
            ) from error

    def _check_forward(self) -> None:
        """Raise UsageError if the model itself fails on an image in eval mode."""
        shape = self.shape()
        if shape is not None:
            own_models.run(self.model, own_models.ones(self.model, shape))

    def allocated(
        self, selection: Selection, scores: Mapping[str, Tensor], sparsity: float
    ) -> dict[str, int] | None:
        """Return how many weights each layer keeps, if another criterion allocates."""
        if selection.allocation is None:
            return None
        guard = {
            "min_per_layer": 0 if selection.guard == "none" else 1,
            "per_channel": selection.guard == "channel",
        }
        sizes = {name: each.numel() for name, each in scores.items()}
        total = keep_count(sum(sizes.values()), sparsity)
        if selection.allocation == UNIFORM:
            least = masks.least_of(scores, **guard)
            return masks.allocate(dict.fromkeys(sizes, 1.0), sizes, total, least)
        other, options = criteria.get(selection.allocation), selection.allocation_options
        theirs = self.run(other, sparsity, options)
        chosen = theirs if other.makes_choice(options) else masks.keep(theirs, total, **guard)
        return masks.counts(chosen)

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
        """Return the batches to score; if no data are needed one, for the shape of an image."""
        device, scoring, data = device_of(self.model), self.scoring, self.data
        if isinstance(data, DataSource):
            data = data.to(device)
            if criterion.trains:
                size = options.get("batch_size", criterion.options["batch_size"])
                return data.training_batches(size, self.seed)
            if not criterion.needs_data:
                return data.score_batches(1, seed=self.seed)
            images = scoring.samples_per_class * data.num_classes
            batches = data.score_batches(
                scoring.samples_per_class,
                seed=self.seed,
                batches=scoring.batches,
                batch_size=min(scoring.batch_size, -(-images // self.ranks.world_size)),
                rank=self.ranks.rank,
                world_size=self.ranks.world_size,
            )
            return batches if self.ranks.world_size == 1 else Shared(batches)
        if criterion.trains:
            return data
        chosen = data if criterion.needs_data else islice(data, 1)
        here = [(images.to(device), labels.to(device)) for images, labels in chosen]
        return Shared(here) if self.ranks.world_size > 1 and criterion.needs_data else here


def _held(data: Any, used: list[criteria.Criterion], classes: int | None) -> Any:
    """Return batches that can be read repeatedly, and no more than the criteria need."""
    checked = Checked(data, classes)
    if any(criterion.trains for criterion in used):
        return list(checked) if isinstance(data, Iterator) else checked
    if any(criterion.needs_data for criterion in used):
        return list(checked)
    return list(islice(checked, 1))


def _classes(model: nn.Module, loss_fn: LossFn) -> int | None:
    """Return the number of classes that labels lie below, where the loss tells."""
    classes = getattr(model, "num_classes", None)
    return classes if isinstance(classes, int) and loss_fn is nn.functional.cross_entropy else None


def _warn_of_level_scores(scores: Mapping[str, Tensor], criterion: str, sparsity: float) -> None:
    """Warn of layers whose weights all have the same score, and note them on the card.

    Layers that were pruned whole in one round, with scores below zero, do not count.
    """
    level = [
        name
        for name, score in scores.items()
        if score.numel() > 1 and score.max() >= 0 and score.min() == score.max()
    ]
    if level and sparsity:
        note("level", level)
        warnings.warn(
            f"{criterion} gives all weights the same score in {len(level)} of {len(scores)} layers "
            f"({', '.join(level[:3])}{' …' if len(level) > 3 else ''}): no signal or gradient "
            "reaches them; use larger images, or exclude these layers",
            stacklevel=5,
        )


def excluded(model: nn.Module, exclude: Sequence[str]) -> tuple[str, ...]:
    """Return the patterns of weights to leave dense: as given, or as the model's recipe says."""
    return tuple(exclude) or tuple(getattr(model, "autosparse_recipe", {}).get("exclude", ()))


def same_everywhere(mine: str, what: str, ranks: Ranks) -> None:
    """Raise RunFailed on every rank unless `mine` is the same on all ranks."""
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
