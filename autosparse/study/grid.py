"""The cells of a study: one for every training, each with a folder of its own.

A cell is a dense network, a ticket or a twin of one, at a point of the study's axes. Its folder is
named by a hash of all that makes it, so a study that was killed goes on with the same command, and
cells may be trained in any order, by any process, on any machine that shares the folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from autosparse import criteria
from autosparse.core.config import identity, plain, run_id
from autosparse.core.files import read_json, write_json
from autosparse.criteria import scoring
from autosparse.criteria.pruning import DENSE
from autosparse.data.config import DataConfig
from autosparse.models.config import ModelConfig
from autosparse.sparsity import twins as controls
from autosparse.study import axes
from autosparse.study import labels as asked
from autosparse.study.axes import Point
from autosparse.study.config import StudyConfig
from autosparse.study.labels import BASELINES, IRP, TICKET
from autosparse.study.trainings import RESULT
from autosparse.training.config import TrainingConfig

LOCAL, RAY, DEEPSPEED = "local", "ray", "deepspeed"
STOPPED, FAILED = "stopped.json", "failed.json"
NO_TOPOLOGY: dict[str, Any] = {
    each.name: each.default for each in fields(TrainingConfig) if each.name.startswith("topology")
}
"""The settings of a topology as they are where none moves."""


@dataclass(frozen=True)
class StudyCell:
    """One training of a study."""

    config: StudyConfig
    """The study, with the model and the settings of this cell in place."""
    label: str
    """A criterion, or a name that `options` explains; a baseline; or dense."""
    twin: str
    """ticket, or which twin of it."""
    sparsity: float
    seed: int
    point: Point = field(default_factory=dict)
    """What differs from the study's settings."""

    @property
    def name(self) -> str:
        """For folders and progress bars."""
        twin = "" if self.twin == TICKET else f"-{self.twin}"
        return f"{self.label}{twin}-{self.sparsity * 100:g}-seed{self.seed}"

    @property
    def key(self) -> str:
        """The name, with a hash of all that makes the cell."""
        return f"{self.name}-{_hash(self, trained=True)}"

    @property
    def folder(self) -> Path:
        """Where the result goes."""
        return Path(self.config.out) / "cells" / self.key

    @property
    def training(self) -> str:
        """A hash of all that a training of the dense model depends on.

        Nothing that prunes, and no topology, which a dense model has none of.
        """
        config = self.config
        training = replace(config.training, **NO_TOPOLOGY)
        return run_id(config.model, run_id(config.data), run_id(training), str(self.seed))

    @property
    def ticket_key(self) -> str:
        """The name of the ticket, with a hash of all that makes it; twins share their ticket's."""
        own = replace(self, twin=TICKET)
        return f"{own.name}-{_hash(own, trained=False)}"

    @property
    def contest(self) -> str:
        """A hash of the model and of the images that accuracies are measured on.

        Cells of two contests are never held against each other.
        """
        data = self.config.data
        measured = DataConfig(
            data.name, data.root, data.image_size, validation_fraction=data.validation_fraction,
            allow_remote=data.allow_remote, cache=data.cache,
        )  # fmt: skip
        return run_id(self.config.model, run_id(measured))

    @property
    def group(self) -> tuple[str, str, float, int]:
        """Model, data, sparsity and seed: ASHA holds a cell against others of these only."""
        config = self.config
        return run_id(config.model), run_id(config.data), self.sparsity, self.seed

    @property
    def state(self) -> str:
        """Return finished, stopped (by ASHA), failed or to do."""
        if (self.folder / RESULT).is_file():
            return "finished"
        if self.config.asha and (self.folder / STOPPED).is_file():
            return "stopped"
        return "failed" if (self.folder / FAILED).is_file() else "to do"

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do; what failed is tried again."""
        return self.state in ("finished", "stopped")

    def result(self) -> dict[str, Any]:
        """Return the result of a finished cell, with its place in the study."""
        return {**read_json(self.folder / RESULT), **self.place}

    @property
    def place(self) -> dict[str, Any]:
        """What tells the cell from the others of the study, in words."""
        config, settings = self.config, axes.shown(self.point)
        if [each.name for each in config.models].count(config.model.name) > 1:
            others = {key: each for key, each in plain(config.model).items() if key != "name"}
            own = ", ".join(f"{key} {each}" for key, each in others.items() if each)
            settings = ", ".join(each for each in (own, settings) if each)
        return {
            "label": self.label, "twin": self.twin, "sparsity": self.sparsity, "cell": self.key,
            "model": config.model.name, "training": settings, "contest": self.contest,
        }  # fmt: skip

    def history(self) -> list[dict[str, Any]]:
        """Return the epochs of a finished or stopped cell."""
        file = RESULT if (self.folder / RESULT).is_file() else STOPPED
        return read_json(self.folder / file)["history"]

    def failed(self, error: str) -> None:
        """Write down why the cell failed."""
        write_json(self.folder / FAILED, {"error": error})

    def error(self) -> str:
        """Return why the cell failed."""
        return read_json(self.folder / FAILED)["error"]


def cells(config: StudyConfig) -> Iterator[StudyCell]:
    """Yield the cells of a grid: at every point all that the lists of criteria and twins say.

    A dense training comes once, at the first of the points that only prune otherwise.
    """
    dense = set()
    for model in range(len(models(config))):
        for point in axes.points(config):
            for cell in _cells_at(settled(config, model, point), point):
                if cell.label != DENSE or cell.training not in dense:
                    yield cell
                dense.add(cell.training)


def _cells_at(config: StudyConfig, point: Point) -> Iterator[StudyCell]:
    """Yield, per seed, the dense cell, every ticket with its twins, and the baselines."""
    names = asked.labels(config)
    twins = [TICKET, *(twin for twin in config.twins if twin in controls.TWINS)]
    baselines = [name for name in BASELINES if name in config.twins and name not in names]
    for seed in asked.seeds(config):
        yield StudyCell(config, DENSE, TICKET, 0.0, seed, point)
        for sparsity in asked.sparsities(config):
            kinds = [(label, twin) for label in names for twin in twins]
            for label, twin in [*kinds, *((name, TICKET) for name in baselines)]:
                yield StudyCell(config, label, twin, sparsity, seed, point)


def models(config: StudyConfig) -> list[ModelConfig]:
    """Return the models of a study."""
    return config.models or [config.model]


def settled(config: StudyConfig, model: int, point: Point) -> StudyConfig:
    """Return the study with one of its models and the values of a point in place."""
    if config.executor == RAY:
        config = replace(config, device="cuda" if config.gpus_per_trial else "cpu")
    return axes.at(replace(config, model=models(config)[model]), point)


def _hash(cell: StudyCell, *, trained: bool) -> str:
    """Return a hash of all that makes a cell's ticket, and of its training.

    A criterion's defaults are part of it: where one changes, what was trained before is not found.
    """
    config = cell.config
    name, given = asked.criterion_of(config, cell.label)
    criterion = None if name in (DENSE, IRP) else criteria.get(name)
    options = (criterion.defaults if criterion else {}) | given
    place = (  # As the first version wrote it: folders are named by it.
        f"Trial(label={cell.label!r}, twin={cell.twin!r}, sparsity={cell.sparsity!r}, "
        f"seed={cell.seed!r})"
    )
    parts = [run_id(config.model), run_id(config.data), run_id(config.scoring), place]
    parts += [name, str(sorted(options.items())), str(asked.selection(config, cell.label))]
    if trained or name == IRP:
        parts.append(run_id(config.training))
    if criterion:
        parts.append(str(criterion.provenance(**given)) if criterion.provenance else "")
    parts += _beyond(config, name, given)
    return run_id(config.model, *parts)


def _beyond(config: StudyConfig, name: str, given: dict[str, Any]) -> list[str]:
    """Return what a ticket depends on beyond what the first version hashed; [] if nothing."""
    beyond = {}
    if name == IRP:
        known = (*asked.irp_settled(config, 0.5, 0), *given)
        changed = identity(asked.irp_config(config, given, 0.5, 0))
        beyond = {key: each for key, each in changed.items() if key not in known}
    if config.units and name != DENSE:
        beyond["units"] = config.units
    if config.allocation not in (None, scoring.UNIFORM):
        beyond |= criteria.get(config.allocation).beyond(config.allocation_options)
    return [str(sorted(beyond.items()))] if beyond else []
