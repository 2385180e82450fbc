"""What a criterion is, and the registry of all criteria.

A criterion returns one of two things. `Scores` rank the weights, and `prune` decides how many stay
and where. `Masks` are the choice itself, for criteria that pick a set of weights as a whole; scope,
allocation, guard and pattern say how scores become masks, so they do not apply to a choice.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autosparse.core.errors import UsageError, unknown
from autosparse.criteria.units import Dial
from autosparse.models import batch_norm
from autosparse.models.contract import checked_loss, gradients_on
from autosparse.models.gradients import LossFn, Shared
from autosparse.models.restore import untouched
from autosparse.models.standardised import kernels_masked
from autosparse.models.zoo import prunable
from autosparse.sparsity import masks
from autosparse.sparsity.counts import keep_count
from autosparse.sparsity.masks import Masks, is_finite

Scores = dict[str, Tensor]
"""Per prunable weight a float tensor of its shape; higher = keep."""
FORMER: dict[str, dict[str, Any]] = {"autos": {"temperature": 1.0}}
"""Criterion -> options that it no longer has, with their defaults: still part of a trial's id."""
FIRST: dict[str, dict[str, Any]] = {
    "autos": {
        "autos": "46f37190ccfe987d",
        "corpus": "57c4fb23d0759c3d",
        "choice": "live",
        "densities": "learned",
        **FORMER["autos"],
    },
    "autos_irp": {"autos": "46f37190ccfe987d", "corpus": "57c4fb23d0759c3d"},
}
"""Criterion -> the first default of an option that has changed since, and the first packaged file.

Scores that rest on these keep the ids of earlier versions; see config.FIRST_DEFAULTS.
"""
NUMBERS = {int: (Integral, "a whole number"), float: (Real, "a number")}
"""Kind of an option's default -> the kind that is wanted of its value, and its name."""
UNITS = "units"
"""Argument of a criterion that `takes_units`: a `units.Dial`, or None; it is no option."""
EMPTY = inspect.Parameter.empty
_REGISTRY: dict[str, Criterion] = {}
NO_CRITERION = (
    "base", "card", "config", "own_models", "pruning", "rounds", "scoring", "selection",
    "units",
)  # fmt: skip
"""Files of this package that hold no criterion."""


@dataclass(frozen=True)
class Criterion:
    """A registered criterion."""

    name: str
    function: Callable[..., Scores | Masks]
    """(model, parameters, batches, loss_fn, **options) -> scores, or masks where it `chooses`."""
    needs_data: bool
    """Whether it looks at the batches."""
    trains: bool = False
    """Whether it trains, and so wants an endless stream of training batches, not a sample."""
    provenance: Callable[..., dict[str, str]] | None = None
    """Options -> fingerprints of the files that the result depends on, for the ticket's card."""
    learned: bool = False
    """Whether it was fitted on networks of `models.create`, and expects their initial values."""
    chooses: bool | Callable[..., bool] = False
    """Whether it returns Masks instead of Scores; where its options decide, a function of them."""

    allocates: bool = False
    """Whether its scores are made for given layer counts, which no other setting may change."""
    takes_units: bool = False
    """Whether it chooses inside units by itself; the argument `units` tells it which there are and
    how much is asked for."""

    def makes_choice(self, options: Mapping[str, Any]) -> bool:
        """Return whether the criterion returns Masks when it is given these options."""
        return self.chooses(**options) if callable(self.chooses) else self.chooses

    @property
    def options(self) -> dict[str, Any]:
        """Options with their defaults: the function's keyword-only arguments.

        Without `units`, where the criterion `takes_units`: that is a setting of the selection.
        """
        parameters = inspect.signature(self.function).parameters.values()
        return {
            each.name: each.default
            for each in parameters
            if each.kind is each.KEYWORD_ONLY and not (self.takes_units and each.name == UNITS)
        }

    @property
    def defaults(self) -> dict[str, Any]:
        """Defaults of the options that have one, former options too: what ids are made of."""
        own = {key: each for key, each in self.options.items() if each is not EMPTY}
        return FORMER.get(self.name, {}) | own

    def beyond(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the result depends on beyond the name and the options asked for.

        That is: defaults that have changed since the first version, and files by their content.
        """
        first, files = FIRST.get(self.name, {}), {}
        if self.provenance:
            files = self.provenance(**asked)
        other = {key: each for key, each in files.items() if first.get(key) != each}
        return self.changed_defaults(asked) | other

    def changed_defaults(self, asked: Collection[str]) -> dict[str, Any]:
        """Return the defaults in force, of options not asked for, that differ from the first."""
        first = {**self.options, **FIRST.get(self.name, {})}
        return {
            key: each
            for key, each in self.options.items()
            if key not in asked and each != first[key]
        }

    def check(self, options: Collection[str]) -> None:
        """Raise UsageError for an option that the criterion does not have."""
        for key in options:
            if key not in self.options:
                raise unknown(f"option of {self.name}", key, self.options)

    def check_asked(self, options: Mapping[str, Any]) -> None:
        """Raise UsageError for options of `prune` that the criterion does not take.

        Sparsity is no such option: it is told beside them, and the card says it.
        """
        self.check(options)
        if "sparsity" in options:
            raise UsageError(f"give sparsity by itself, not among the options of {self.name}")
        for key, value in options.items():
            kind, wanted = NUMBERS.get(type(self.options[key]), (object, ""))
            if not isinstance(value, kind) or (wanted and isinstance(value, bool)):
                raise UsageError(f"option {key} of {self.name} must be {wanted}, got {value!r}")

    def _check_none_lacks(self, given: Collection[str]) -> None:
        for key, value in self.options.items():
            if value is EMPTY and key not in given:
                raise UsageError(f"criterion {self.name} needs the option {key}")

    def check_whole(self, options: Mapping[str, Any], filled: Collection[str] = ()) -> None:
        """Raise UsageError for options that are wrong or lacking, and files that are not there.

        `filled` are options that are given when it is called.
        """
        self.check_asked(options)
        self._check_none_lacks((*options, *filled))
        if self.provenance:
            self.provenance(**options)

    def __call__(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Tensor, Tensor]],
        loss_fn: LossFn,
        *,
        exclude: Sequence[str] = (),
        training_mode: bool = True,
        warm_up: bool = False,
        dial: Dial | None = None,
        **options: Any,
    ) -> Scores | Masks:
        """Score or choose among the prunable weights; model and RNGs are left as they were.

        Returns per prunable weight a tensor of its shape: float scores, or a bool mask with as
        many True as `sparsity` asks for where the criterion chooses.

        Args:
            model: on the device of the batches.
            batches: (normalised images [B, C, H, W], labels [B]); not looked at if
                `needs_data` is False. A `gradients.Shared` is one rank's share: the scores
                are then those of all ranks' batches, the same on every rank.
            loss_fn: (outputs, labels) -> mean loss.
            exclude: patterns of weights that are not prunable (see `models.prunable`).
            training_mode: whether the model is in train mode: batch norm uses the batch's
                statistics, dropout is on. In eval mode scores do not depend on how the samples
                are cut into batches.
            warm_up: set batch norm's running statistics from the batches first.
            dial: what a criterion that `takes_units` gets as `units`.
            options: the criterion's own; an unknown one raises UsageError.
        """
        self.check(options)
        self._check_none_lacks(options)
        inside = {} if dial is None else {UNITS: dial}
        if not self.trains and not isinstance(batches, Sequence):
            batches = list(batches)
        if self.needs_data and not self.trains and not isinstance(batches, Shared) and not batches:
            raise UsageError(f"criterion {self.name} needs data, and there is no batch")
        parameters, loss = prunable(model, exclude), checked_loss(loss_fn, model)
        with gradients_on(), untouched(model), kernels_masked(model):
            if warm_up and self.needs_data and not self.trains:
                batch_norm.warm_up(model, batches)
            model.train(training_mode)
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            returned = self.function(model, parameters, batches, loss, **options, **inside)
        if isinstance(batches, Shared):
            as_on_rank_0(returned)
        returned = {name: returned[name].detach() for name in parameters}
        if self.makes_choice(options):
            self._check_masks(returned, options.get("sparsity"))
        else:
            self._check_scores(returned)
        return returned

    def _check_scores(self, scores: Scores) -> None:
        for layer, score in scores.items():
            if score.dtype == torch.bool:
                raise TypeError(f"{self.name} returned masks; register it with chooses=True")
            if not is_finite(score):
                raise UsageError(f"{self.name}: the scores of {layer} are not finite")

    def _check_masks(self, chosen: Masks, sparsity: float | None) -> None:
        if any(mask.dtype != torch.bool for mask in chosen.values()):
            raise TypeError(f"{self.name} is registered with chooses, and returned no bool masks")
        kept = masks.kept(chosen)
        if sparsity is not None and kept != keep_count(masks.total(chosen), sparsity):
            raise UsageError(
                f"{self.name} chose {kept} of {masks.total(chosen)} weights, not as many as "
                f"sparsity {sparsity:g} asks for"
            )


def as_on_rank_0(tensors: dict[str, Tensor]) -> None:
    """Give every rank the tensors of rank 0: the last bits may differ between machines."""
    for name, tensor in tensors.items():
        tensors[name] = tensor.contiguous()
        dist.broadcast(tensors[name], 0)


def register(name: str, *, needs_data: bool, **fields: Any) -> Callable:
    """Register the decorated function as the criterion `name`; see Criterion for the fields."""

    def add(function: Callable[..., Scores | Masks]) -> Callable[..., Scores | Masks]:
        _REGISTRY[name] = Criterion(name, function, needs_data, **fields)
        return function

    return add


def _load_all() -> None:
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name not in NO_CRITERION:
            importlib.import_module(f"{package}.{module.name}")


def names() -> list[str]:
    """Return the names of all criteria, sorted."""
    _load_all()
    return sorted(_REGISTRY)


def get(name: str) -> Criterion:
    """Return the criterion of that name; raise UsageError with the nearest right name."""
    _load_all()
    if name not in _REGISTRY:
        raise unknown("criterion", name, _REGISTRY)
    return _REGISTRY[name]
