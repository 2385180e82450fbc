"""How scores become masks: scope, allocation, guard, pattern."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from autosparse import criteria
from autosparse.core.errors import UsageError, unknown
from autosparse.criteria.units import Dial, Rooms, rooms
from autosparse.sparsity import masks, reach
from autosparse.sparsity.masks import Masks
from autosparse.sparsity.paths import CannotFollow
from autosparse.sparsity.slim_groups import coupled

UNIFORM = "uniform"
GUARDS = ("layer", "channel", "live", "none")


@dataclass(frozen=True)
class Selection:
    """How scores become masks; see PruneConfig for the fields."""

    scope: str = "global"
    allocation: str | None = None
    allocation_options: dict[str, Any] = field(default_factory=dict)
    guard: str = "layer"
    pattern: str | None = None
    units: float = field(default=0.0, repr=False)  # Names of earlier tickets have no units in them.

    def check(self) -> None:
        """Raise UsageError for what cannot be."""
        if self.guard not in GUARDS:
            raise unknown("guard", self.guard, GUARDS)
        if self.scope not in masks.SCOPES:
            raise unknown("scope", self.scope, masks.SCOPES)
        if self.allocation is not None and self.allocation != UNIFORM:
            self._check_allocation(criteria.get(self.allocation))
        if not 0 <= self.units <= 1:
            raise UsageError(f"units must be from 0 (none) to 1 (whole units), got {self.units}")
        if self.units and self.pattern is not None:
            raise UsageError("a pattern n:m settles where weights may be; leave out units")
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

    def _check_allocation(self, other: criteria.Criterion) -> None:
        other.check_asked(self.allocation_options)
        if self.guard in ("channel", "none") and other.makes_choice(self.allocation_options):
            raise UsageError(
                f"allocation {other.name} chooses how much layers keep, so guard {self.guard} does "
                "not apply; leave out one of them"
            )

    def check_for(self, criterion: criteria.Criterion, options: Mapping[str, Any]) -> None:
        """Raise UsageError for settings that do not apply to what the criterion returns.

        Scores follow every selection, but for those that are made for given layer counts (ERK);
        masks follow none.
        """
        usual = Selection()
        for name in ("scope", "allocation", "pattern", "guard", "units"):
            asked = getattr(self, name)
            if asked == getattr(usual, name) or (name == "units" and criterion.takes_units):
                continue
            if criterion.makes_choice(options):
                does, others = "chooses the weights itself", "one that gives scores (snip)"
            elif criterion.allocates and name not in ("guard", "units"):
                does, others = "settles how much layers keep", "another (random)"
            else:
                continue
            raise UsageError(
                f"criterion {criterion.name} {does}, so {name} {asked} does not apply; leave it "
                f"out, or use {others}"
            )

    def n_of_m(self) -> tuple[int, int]:
        """Return n and m of the pattern."""
        n, colon, m = (self.pattern or "").partition(":")
        if not (colon and n.isdecimal() and m.isdecimal() and 0 < int(n) <= int(m)):
            raise UsageError(f"a pattern is n:m with 0 < n <= m, such as 2:4, not {self.pattern!r}")
        return int(n), int(m)


@dataclass(frozen=True)
class Scored:
    """What a criterion said of a model's weights, and how that becomes masks."""

    scores: criteria.Scores
    """Empty where the criterion chose."""
    counts: dict[str, int] | None
    """How many weights each layer keeps, where another criterion allocates."""
    selection: Selection
    shape: tuple[int, ...] | None
    """[C, H, W] of an image, where it is known."""
    masks: Masks | None = None
    """What the criterion chose, if it does."""
    dial: Dial | None = None
    """Which units can go, where the selection asks for that."""


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


def dial_of(
    model: nn.Module, selection: Selection, names: Iterable[str], shape: tuple[int, ...] | None
) -> Dial | None:
    """Return which units of a model can go, if the selection asks for that.

    Raises UsageError where none can, and where the model cannot be traced.
    """
    if not selection.units:
        return None
    if shape is None:
        raise UsageError("units needs to know the images' shape: give a batch, or named data")
    dial = Dial(coupled(model, names, shape), selection.units)
    dial.check()
    return dial


def into_units(chosen: Masks, scored: Scored, dial: Dial) -> tuple[Masks, Rooms]:
    """Return masks inside the units that stay, as many as `units` says, and where these lie."""
    selection = scored.selection
    per_channel = selection.guard == "channel"
    quota = rooms(
        dial,
        scored.scores,
        chosen,
        min_per_layer=0 if selection.guard == "none" else 1,
        per_channel=per_channel,
    )
    within = quota.within
    return (
        masks.keep_counts(scored.scores, quota.counts, per_channel=per_channel, within=within),
        quota,
    )


def tie_entry(scored: Scored, chosen: Masks) -> dict[str, int]:
    """Return the card's entry on ties at the threshold if there are many; warn of them too."""
    if scored.selection.pattern is not None:
        return {}
    by_layer = scored.counts is not None or scored.selection.scope == "layer"
    tied, kept = masks.ties(scored.scores, chosen, by_layer=by_layer), masks.kept(chosen)
    if tied <= masks.MANY_TIES * kept:
        return {}
    warnings.warn(
        f"{tied:,} weights have the very score that the threshold fell on ({kept:,} are kept): "
        "which of them stay was settled by their position; use another criterion or more data",
        stacklevel=4,
    )
    return {"ties": tied}


def onto_paths(
    model: nn.Module, chosen: Masks, scored: Scored, within: Masks | None = None
) -> Masks:
    """Exchange weights on no path for others of their layer, inside `within` (guard live)."""
    if scored.shape is None:
        raise UsageError("guard live needs to know the images' shape: give a batch, or named data")
    try:
        return reach.onto_paths(model, chosen, scored.scores, scored.shape, within=within)
    except CannotFollow as error:
        raise UsageError(
            f"guard live: the paths through {type(model).__name__} cannot be followed ({error}); "
            "use guard layer"
        ) from error
