"""The setting of AutoS's paper on one GPU: resnet18 and VGG-16 on all of CIFAR-10.

    python -m benchmarks.paper_cifar10 --config configs/study/paper_cifar10.yaml --data FOLDER \\
        --out FOLDER --minutes 9 --json FILE

An IRP run; AutoS fitted on it alone, as S. Liu, Y. Cheng et al. do (arXiv 2408.14757), and ours;
then tickets of both and of the known criteria, trained by the recipe of the run. FOLDER of the data
holds train/CLASS/*.jpg and test/CLASS/*.jpg.

Every level, fit, ticket and training is a file in --out that is found again, so several short stays
on a GPU add up: the same command goes on. It starts nothing that would not be over after
--minutes, and stops a training with a checkpoint at that time. The table is of what is finished.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autosparse.autos import fit as fit_scorer
from autosparse.autos import fit_heads
from autosparse.autos.config import FitConfig
from autosparse.cli.arguments import guarded, parse
from autosparse.core.config import from_plain, run_id
from autosparse.core.errors import Stopped, unknown
from autosparse.core.files import write_json
from autosparse.core.progress import print_table
from autosparse.core.versions import environment
from autosparse.corpus import store
from autosparse.criteria.config import PruneConfig
from autosparse.criteria.pruning import DENSE
from autosparse.data import sets as data
from autosparse.data.config import DataConfig
from autosparse.data.identity import looked_at_once
from autosparse.data.sets import DataSource
from autosparse.irp import run as irp
from autosparse.irp.config import IRPConfig
from autosparse.irp.levels import MASKED, level_file, way_on
from autosparse.models import zoo
from autosparse.models.config import ModelConfig
from autosparse.study.cells import Cell, cells
from autosparse.study.config import SparseTrainConfig
from autosparse.study.trainings import train_cell
from autosparse.training.config import TrainingConfig
from autosparse.training.masked_stepper import MaskedStepper
from autosparse.training.steppers import PlainStepper

IRP = "irp"


@dataclass(frozen=True)
class PaperConfig:
    """What is trained and pruned."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """What the IRP run is of, and the first model that is pruned."""
    others: list[ModelConfig] = field(default_factory=list)
    """More models to prune, by the same scorers."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data; --data sets the folder."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How levels and tickets are trained."""
    irp: dict[str, Any] = field(default_factory=dict)
    """Settings of the IRP run: levels, final_density, label, seed …"""
    scorers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of a criterion -> how its AutoS is fitted on the run (FitConfig)."""
    criteria: list[str] = field(default_factory=list)
    """Criteria, scorers, and `irp`: of the run, the level whose density is nearest."""
    sparsities: list[float] = field(default_factory=lambda: [0.95])
    """Sparsities of the tickets."""
    seeds: list[int] = field(default_factory=lambda: [1])
    """Seeds of the tickets."""


@dataclass(frozen=True)
class Row:
    """One training: a ticket of a model, or the dense model."""

    model: ModelConfig
    criterion: str
    sparsity: float
    seed: int


@dataclass
class Clock:
    """What time there is."""

    seconds: float
    started: float = field(default_factory=time.monotonic)

    def over(self, needed: float = 0.0) -> bool:
        """Return whether there are no `needed` seconds left."""
        return time.monotonic() - self.started + needed >= self.seconds

    def check(self, needed: float = 0.0) -> None:
        """Raise Stopped if there are not."""
        if self.over(needed):
            raise Stopped("the time is over; the same command goes on from here")


class Study:
    """The pieces, each found again in `out`."""

    def __init__(self, config: PaperConfig, out: Path, device: str, clock: Clock) -> None:
        self.config, self.out, self.clock = config, out, clock
        self.device = zoo.choose_device(device)
        self.source: DataSource | None = None
        self.grown: store.IRPRun | None = None
        self.steppers: dict[str, MaskedStepper] = {}
        check(config)

    def irp_config(self) -> IRPConfig:
        """Return the IRP run."""
        config = self.config
        settings = {"model": config.model, "data": config.data, "training": config.training}
        place = {"device": str(self.device), "out": str(self.out / "corpus")}
        return from_plain(IRPConfig, {**config.irp, **settings, **place})

    def run(self) -> store.IRPRun:
        """Return the IRP run, finished; stop between levels when the time is over."""
        config = self.irp_config()
        folder = irp.run_folder(config)

        def on_level(entry: dict[str, Any]) -> None:
            say(f"IRP level {entry['level']}: {entry['density']:.2%} of the weights, validation "
                f"{entry['validation_accuracy']:.2%}, {entry['seconds']:.1f} s")  # fmt: skip
            following = level_file(folder, entry["level"] + 1)
            if entry["level"] < config.levels and not following.exists():
                self.clock.check(entry["seconds"])

        if self.grown is None:
            if not store.is_finished(folder):
                self.clock.check()
            self.grown = store.read_run(irp.run_irp(config, on_level=on_level))
        return self.grown

    def scorer(self, name: str, run: store.IRPRun) -> Path:
        """Return the file of an AutoS that was fitted on the run alone."""
        folder = str(self.out / "corpus")
        fitting = from_plain(FitConfig, {**self.config.scorers[name], "corpus": folder})
        path = self.out / f"{name}-{run_id(fitting, run.card['run_id'])}.safetensors"
        if not path.is_file():
            self.clock.check()
            fit = (fit_heads if fitting.head == "survival" else fit_scorer).fit
            network = fit(fitting)
            network.save(path)
            say(f"{name} fitted: MSE {network.card['best']['validation_mse']:.4f}")
        return path

    def training(self, row: Row) -> SparseTrainConfig:
        """Return the training of a row; its ticket is made if it has a file of its own."""
        config, kind, options = self.config, row.criterion, {}
        found = SparseTrainConfig(
            data=config.data, training=config.training, seed=row.seed, out=str(self.out / "trained")
        )
        if kind == DENSE:
            return replace(found, model=row.model)
        if kind == IRP:
            return replace(found, tickets=[str(self.irp_ticket(row.sparsity))])
        if kind in config.scorers:
            kind, options = "autos", {"scorer": str(self.scorer(row.criterion, self.run()))}
        asked = PruneConfig(row.model, config.data, kind, options, row.sparsity, seed=row.seed)
        return replace(found, prune=asked)

    def irp_ticket(self, sparsity: float) -> Path:
        """Return the file of the ticket of the run whose density is nearest."""
        run = self.run()
        densities = [entry["density"] for entry in run.card["levels"]]
        level = nearest(densities, 1 - sparsity)
        path = self.out / "tickets" / f"irp-{run.card['run_id']}-level{level}.safetensors"
        if not path.is_file():
            run.ticket(level).save(path)
        return path

    def result(self, row: Row) -> dict[str, Any]:
        """Prune and train a row, or find what it gave."""
        training = self.training(row)
        (cell,) = list(cells(training, device=str(self.device)))
        if cell.done:
            result = cell.result()
        else:
            self.clock.check()
            result = train_cell(
                cell,
                training,
                self.loaded(),
                lambda model, steps: self.stepper(cell, row.model, model, steps),
                device=str(self.device),
                stop=self.clock.over,
            )
        return {**row_of(row), **{key: result[key] for key in SHOWN}}

    def loaded(self) -> DataSource:
        """Return the data on the device."""
        if self.source is None:
            self.source = data.load(self.config.data).to(self.device)
        return self.source

    def stepper(self, cell: Cell, kind: ModelConfig, model: Any, steps: int) -> PlainStepper:
        """Return what trains a ticket: on a GPU one network for all tickets of a model."""
        training = self.config.training
        if way_on(self.device, training) != MASKED:
            return PlainStepper(model, training, steps)
        key = run_id(kind)
        if key not in self.steppers:
            self.steppers.clear()  # One network at a time.
            dense = zoo.from_recipe(cell.ticket.card["model"]).to(self.device)
            self.steppers[key] = MaskedStepper(dense, training, steps, list(cell.ticket.masks))
        return self.steppers[key].begin(cell.ticket)


SHOWN = ("test_accuracy", "validation_accuracy", "kept", "effective_density", "seconds",
         "prune_seconds")  # fmt: skip


def nearest(densities: list[float], density: float) -> int:
    """Return the place of the density that is nearest, as a ratio."""
    return min(range(len(densities)), key=lambda i: abs(math.log(densities[i] / density)))


def check(config: PaperConfig) -> None:
    """Raise UsageError for criteria that are none."""
    from autosparse import criteria

    for name in config.criteria:
        if name != IRP and name not in config.scorers and name not in criteria.names():
            raise unknown("criterion", name, [IRP, *config.scorers, *criteria.names()])


def rows(config: PaperConfig) -> Iterator[Row]:
    """Yield all trainings, the most telling first: by model, then seed, then sparsity."""
    for model in [config.model, *config.others]:
        kinds = [k for k in config.criteria if k != IRP or model == config.model]
        for seed in config.seeds:
            yield Row(model, DENSE, 0.0, seed)
            for sparsity in config.sparsities:
                yield from (Row(model, kind, sparsity, seed) for kind in kinds)


def row_of(row: Row) -> dict[str, Any]:
    """Return the row as plain data."""
    return {
        "model": row.model.name, "criterion": row.criterion, "sparsity": row.sparsity,
        "seed": row.seed,
    }  # fmt: skip


def table(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per model, criterion and seed, with the test accuracy at each sparsity."""
    columns = sorted({row["sparsity"] for row in found})
    whole: dict[tuple, dict[str, Any]] = {}
    for row in found:
        key = row["model"], row["criterion"], row["seed"]
        blank = {f"at {sparsity:.0%}": "" for sparsity in columns}
        named = dict(zip(("model", "criterion", "seed"), key, strict=True))
        line = whole.setdefault(key, named | blank)
        line[f"at {row['sparsity']:.0%}"] = f"{row['test_accuracy']:.2%}"
    return list(whole.values())


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def do(study: Study, write: Callable[[list[dict[str, Any]]], None]) -> tuple[list[dict], bool]:
    """Do what there is time for; return the finished rows, and whether that is all of them."""
    found: list[dict[str, Any]] = []
    try:
        study.run()
        for row in rows(study.config):
            found.append(study.result(row))
            last = found[-1]
            say(f"{last['model']} {last['criterion']} {last['sparsity']:.0%}: test "
                f"{last['test_accuracy']:.2%}, {last['seconds']:.1f} s")  # fmt: skip
            write(found)
    except Stopped as stopped:
        say(str(stopped))
        return found, False
    return found, True


def main(arguments: list[str]) -> None:
    """Do what there is time for, print it and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/study/paper_cifar10.yaml")
    parser.add_argument("--data", help="folder of the images")
    parser.add_argument("--out", type=Path, required=True, help="folder of all pieces")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    asked = parser.parse_args(arguments)
    clock = Clock(60 * asked.minutes)
    config = parse(PaperConfig, ["--config", asked.config], "paper_cifar10", __doc__)
    if asked.data:
        config = replace(config, data=replace(config.data, root=asked.data))

    def write(found: list[dict[str, Any]]) -> None:
        if asked.json:
            levels = study.grown.card["levels"] if study.grown else []
            write_json(asked.json, {"environment": environment(), "levels": levels, "rows": found})

    study = Study(config, asked.out, asked.device, clock)
    with data.remembered(), looked_at_once():
        found, finished = do(study, write)
    write(found)
    print_table(table(found), "Test accuracy by sparsity")
    total = sum(1 for _ in rows(config))
    say(f"{len(found)} of {total} trainings{'' if finished else '; the same command goes on'}")


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
