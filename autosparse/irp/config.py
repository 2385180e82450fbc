"""Settings of IRP runs, and of a corpus of them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

from autosparse.core.config import local, run_id
from autosparse.core.errors import UsageError, unknown
from autosparse.data.config import DataConfig
from autosparse.models.config import ModelConfig
from autosparse.training.config import TrainingConfig


@dataclass(frozen=True)
class LevelsConfig:
    """What an IRP run does at its levels; all runs of a corpus share it."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How each level is trained."""
    levels: int = 6
    """N: how often the network is pruned."""
    final_density: float = 0.02
    """Fraction of prunable weights left at the last level."""
    schedule: str = "exponential"
    """Density at level i: exponential final^(i/N), or linear 1 - (1 - final) i/N."""
    scope: str = "global"
    """global: weights compete across the whole network; layer: only inside their own layer."""
    samples_per_class: int = 10
    """Images per class that gradients at init (features) and SNIP labels are taken on."""
    rewind_steps: int = 0
    """k: rewind to the state after step k of the dense training (late rewinding); 0: to init."""
    steps_per_level: int | None = None
    """Short horizon: steps per level at a constant learning rate, instead of training.epochs."""
    live: bool = False
    """At every level, weights that lie on no path from input to output go first in their layer."""


@dataclass(frozen=True)
class IRPConfig(LevelsConfig):
    """One run of iterative rewind pruning: `levels` + 1 trainings, level 0 dense."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data."""
    label: str = "magnitude"
    """Criterion that ranks the trained weights of a level: magnitude, snip or lamp."""
    seed: int = 0
    """Fixes the initial weights and the order of batches."""
    device: str = local("auto")
    """auto, cpu, cuda, cuda:1 …"""
    out: str = local("corpus")
    """The corpus folder; the run goes into a folder of its own there, named by its run_id."""
    ticket: str | None = local(None)
    """Also write the last level's ticket to this file."""
    store_initial: bool = local(True)
    """Store the initial weights (5 bytes per weight); false: made again from the seed (1 byte)."""


SCHEDULE_KEYS = tuple(each.name for each in fields(LevelsConfig) if each.name != "training")
"""What an entry of `schedules` may set."""


@dataclass(frozen=True)
class CorpusConfig(LevelsConfig):
    """A corpus to grow: one IRP run for every (model, data, seed, label, schedule)."""

    models: list[ModelConfig] = field(default_factory=lambda: [ModelConfig()])
    """The models."""
    data: list[DataConfig] = field(default_factory=lambda: [DataConfig()])
    """The data sets."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """The seeds."""
    labels: list[str] = field(default_factory=lambda: ["magnitude"])
    """The label criteria."""
    schedules: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    """What differs from the settings below, a run for each, e.g. [{}, {levels: 12}]."""
    exclude: list[dict[str, Any]] = field(default_factory=list)
    """Runs to leave out, e.g. {model: "test_vit*", seed: 1}: those that match all of an entry."""
    sample: int | None = None
    """How many of the plan's runs to do, drawn at random; by default all."""
    sample_seed: int = 0
    """Fixes which are drawn."""
    cpus_per_run: float = 1.0
    """Ray CPUs of one run; also its number of threads."""
    gpus_per_run: float = 0.0
    """Ray GPUs of one run; may be a fraction, so that several small models share one."""
    memory_gb_per_run: float = 0.0
    """Memory of one run that Ray keeps free for it, in GB; 0: not looked at."""
    store_initial: bool = True
    """Store initial weights (5 bytes per weight); false: made again from the seed (1 byte)."""
    tracking: bool = False
    """Log to MLflow: a run for the plan, and one nested in it for every IRP run."""
    dry_run: bool = False
    """Print the plan: what is finished and to do, and about what it costs; then stop."""
    out: str = "corpus"
    """The corpus folder, or a URL that fsspec knows (s3://, gs:// …)."""

    def runs(self) -> list[IRPConfig]:
        """Return the plan: one IRPConfig per run; raise UsageError for what cannot be."""
        for schedule in self.schedules:
            for key in schedule:
                if key not in SCHEDULE_KEYS:
                    raise unknown("key in schedules", key, SCHEDULE_KEYS)
        plan = [
            self._run(model, data, seed, label, schedule)
            for model in self.models
            for data in self.data
            for seed in self.seeds
            for label in self.labels
            for schedule in self.schedules
        ]
        plan = list({run_id(run): run for run in plan}.values())  # What is listed twice: once.
        for entry in self.exclude:
            left = [run for run in plan if not _matches(run, entry)]
            if len(left) == len(plan):
                raise UsageError(f"exclude {entry} matches no run of the plan")
            plan = left
        if self.sample is not None:
            if not 1 <= self.sample <= len(plan):
                raise UsageError(f"sample must be 1 to {len(plan)}, got {self.sample}")
            places = random.Random(self.sample_seed).sample(range(len(plan)), self.sample)
            plan = [plan[place] for place in sorted(places)]
        if not plan:
            raise UsageError("the plan has no run: every list needs an entry that is not excluded")
        return plan

    def _run(
        self, model: ModelConfig, data: DataConfig, seed: int, label: str, schedule: dict[str, Any]
    ) -> IRPConfig:
        settings = {key: getattr(self, key) for key in SCHEDULE_KEYS} | schedule
        return IRPConfig(
            model=model, data=data, training=self.training, label=label, seed=seed, out=self.out,
            store_initial=self.store_initial, device="cuda" if self.gpus_per_run else "cpu",
            **settings,
        )  # fmt: skip


def _matches(run: IRPConfig, entry: dict[str, Any]) -> bool:
    """Whether a run has all that an entry of `exclude` says; names may be shell patterns."""
    values = {
        "model": run.model.name, "data": run.data.name, "seed": run.seed, "label": run.label,
        **{key: getattr(run, key) for key in SCHEDULE_KEYS},
    }  # fmt: skip
    for key in entry:
        if key not in values:
            raise unknown("key in exclude", key, values)
    return bool(entry) and all(fnmatchcase(str(values[k]), str(v)) for k, v in entry.items())
