"""The lists of a study's settings: labels of criteria, sparsities, seeds; how masks are chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from autosparse import criteria
from autosparse.core.config import from_plain
from autosparse.core.errors import UsageError, unknown
from autosparse.criteria.scoring import Selection
from autosparse.irp import run as irp
from autosparse.irp.config import IRPConfig
from autosparse.sparsity import twins as controls
from autosparse.sparsity.counts import check_sparsity
from autosparse.study.config import StudyConfig

IRP = "irp"
TICKET = "ticket"
BASELINES = ("erk", "uniform")
"""Controls that are tickets of their own, at the same sparsity."""
ALL_TWINS = (*controls.TWINS, *BASELINES)


def labels(config: StudyConfig) -> list[str]:
    """Return the criteria, by the names that they have in the study."""
    return _listed(config.criteria, str)


def sparsities(config: StudyConfig) -> list[float]:
    """Return the sparsities."""
    return [check_sparsity(each) for each in _listed(config.sparsities, float)]


def seeds(config: StudyConfig) -> list[int]:
    """Return the seeds."""
    return _listed(config.seeds, int)


def criterion_of(config: StudyConfig, label: str) -> tuple[str, dict[str, Any]]:
    """Return the criterion that a label stands for, and its options."""
    options = dict(config.options.get(label, {}))
    return options.pop("criterion", "random" if label == "uniform" else label), options


def selection(config: StudyConfig, label: str = "") -> Selection:
    """Return how the scores of a label become masks; baselines have an allocation of their own."""
    if label == "uniform":
        return Selection(scope="layer", guard=config.guard, units=config.units)
    if label == "erk":
        return Selection(guard=config.guard, units=config.units)
    return Selection(
        config.scope,
        config.allocation,
        config.allocation_options,
        config.guard,
        units=config.units,
    )


def irp_config(
    config: StudyConfig, options: dict[str, Any], sparsity: float, seed: int
) -> IRPConfig:
    """Return the IRP run that ends at `sparsity`, each level trained as tickets are."""
    settled = irp_settled(config, sparsity, seed)
    for key in options:
        if key in settled:
            raise UsageError(f"options.irp.{key}: compare settles it itself")
    run = from_plain(IRPConfig, {**settled, **options})
    irp.check(run)
    return run


def irp_settled(config: StudyConfig, sparsity: float, seed: int) -> dict[str, Any]:
    """Return the settings of an IRP run that come from the study, and that options may not set."""
    return {
        "model": config.model,
        "data": config.data,
        "training": replace(config.training, slim=False),  # Levels go on from the whole network.
        "final_density": 1 - sparsity,
        "seed": seed,
        "device": config.device,
        "out": str(Path(config.out) / "corpus"),
        "scope": config.scope,
    }


def check(config: StudyConfig) -> None:
    """Raise UsageError for a list that is empty, or a name that nobody knows."""
    if not labels(config) or not sparsities(config) or not seeds(config):
        raise UsageError("a study needs at least one criterion, one sparsity and one seed")
    for label in config.options:
        if label not in (*labels(config), *BASELINES):
            raise unknown("label in options", label, labels(config))
    for label in labels(config):
        name, options = criterion_of(config, label)
        if name == IRP:
            if config.units:
                raise UsageError("irp prunes single weights in levels, so units does not apply")
            irp_config(config, options, 0.5, 0)
        else:
            criterion = criteria.get(name)
            criterion.check_whole(options, filled=("sparsity", "seed"))
            selection(config, label).check_for(criterion, options)
    for twin in config.twins:
        if twin not in ALL_TWINS:
            raise unknown("twin", twin, ALL_TWINS)


def _listed(value: Any, kind: Callable[[str], Any]) -> list[Any]:
    """Return a list, or the parts of a text with commas."""
    if isinstance(value, str):
        value = [part for part in (each.strip() for each in value.split(",")) if part]
    elif not isinstance(value, list):
        value = [value]
    try:
        return [kind(each) for each in value]
    except ValueError:
        wanted, such = ("whole numbers", "0,1,2") if kind is int else ("numbers", "0.9,0.95")
        raise UsageError(
            f"{', '.join(map(str, value))}: a list of {wanted} is wanted, such as {such}"
        ) from None
