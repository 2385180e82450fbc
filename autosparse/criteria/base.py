"""What a criterion is, and the register of those that there are."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from autosparse.core.errors import UsageError, unknown
from autosparse.models import gradients
from autosparse.models.contract import checked_loss, gradients_on
from autosparse.models.gradients import LossFn, Shared, untouched
from autosparse.models.standardised import kernels_masked
from autosparse.models.zoo import prunable
from autosparse.sparsity.masks import is_finite

Scores = dict[str, Tensor]
FIRST: dict[str, dict[str, Any]] = {
    "autos": {"autos": "46f37190ccfe987d", "corpus": "57c4fb23d0759c3d"},
    "autos_irp": {"autos": "46f37190ccfe987d", "corpus": "57c4fb23d0759c3d"},
}
"""Criterion -> the first default of an option that has changed since, and the first packaged file.

Scores that rest on these keep the ids of earlier versions; see config.FIRST_DEFAULTS.
"""
_REGISTRY: dict[str, Criterion] = {}
NO_CRITERION = ("base", "config", "prune", "rounds", "scoring")
"""Files of this package that hold no criterion."""


@dataclass(frozen=True)
class Criterion:
    """A registered criterion."""

    name: str
    function: Callable[..., Scores]
    """(model, parameters, batches, loss_fn, **options) -> scores."""
    needs_data: bool
    """Whether it looks at the batches."""
    trains: bool = False
    """Whether it trains, and so wants an endless stream of training batches, not a sample."""
    provenance: Callable[..., dict[str, str]] | None = None
    """Options -> what else the scores depend on, for the ticket's card."""
    learned: bool = False
    """Whether it was fitted on networks as `models.create` makes them, and wants such ones."""

    @property
    def options(self) -> dict[str, Any]:
        """Options with their defaults: the function's keyword-only arguments."""
        parameters = inspect.signature(self.function).parameters.values()
        return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}

    def beyond(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Return what scores depend on beyond the name and the options asked for.

        Defaults that are no longer the first ones, and files such as AutoS by their content.
        """
        first, files = FIRST.get(self.name, {}), {}
        if self.provenance:
            files = self.provenance(**asked)
        other = {key: each for key, each in files.items() if first.get(key) != each}
        return self.changed_defaults(asked) | other

    def changed_defaults(self, asked: Collection[str]) -> dict[str, Any]:
        """Return the defaults that count, as no option asks otherwise, and are not the first."""
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

    def check_whole(self, options: Mapping[str, Any], filled: Collection[str] = ()) -> None:
        """Raise UsageError for options that are unknown or lacking, and files that are not there.

        `filled` are options that are given later.
        """
        self.check(options)
        for key, value in self.options.items():
            if value is inspect.Parameter.empty and key not in (*options, *filled):
                raise UsageError(f"criterion {self.name} needs the option {key}")
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
        **options: Any,
    ) -> Scores:
        """Score every prunable weight of `model`; the model and the RNGs are left as they were.

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
            options: the criterion's own; an unknown one raises UsageError.
        """
        self.check(options)
        missing = [key for key, value in self.options.items() if value is inspect.Parameter.empty]
        for key in missing:
            if key not in options:
                raise UsageError(f"criterion {self.name} needs the option {key}")
        if not self.trains and not isinstance(batches, Sequence):
            batches = list(batches)
        if self.needs_data and not self.trains and not isinstance(batches, Shared) and not batches:
            raise UsageError(f"criterion {self.name} needs data, and there is no batch")
        parameters, loss = prunable(model, exclude), checked_loss(loss_fn, model)
        with gradients_on(), untouched(model), kernels_masked(model):
            if warm_up and self.needs_data and not self.trains:
                gradients.warm_up(model, batches)
            model.train(training_mode)
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            scores = self.function(model, parameters, batches, loss, **options)
        if isinstance(batches, Shared):
            self._agree(scores, parameters)
        return {name: self._checked(name, scores[name]) for name in parameters}

    @staticmethod
    def _agree(scores: Scores, parameters: Iterable[str]) -> None:
        """Give every rank the scores of rank 0: the last bits may differ between machines."""
        for name in parameters:
            scores[name] = scores[name].contiguous()
            dist.broadcast(scores[name], 0)

    def _checked(self, layer: str, score: Tensor) -> Tensor:
        if not is_finite(score):
            raise UsageError(f"{self.name}: the scores of {layer} are not finite")
        return score.detach()


def register(
    name: str,
    *,
    needs_data: bool,
    trains: bool = False,
    provenance: Callable[..., dict[str, str]] | None = None,
    learned: bool = False,
) -> Callable:
    """Register the decorated function as the criterion `name`."""

    def add(function: Callable[..., Scores]) -> Callable[..., Scores]:
        _REGISTRY[name] = Criterion(name, function, needs_data, trains, provenance, learned)
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
