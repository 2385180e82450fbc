"""Compare criteria, each ticket with its twins, seed by seed: does the choice of weights matter?

A cell is one training: a dense network, a ticket, or a twin of one. Its folder is named by a hash
of all that makes it, so a comparison that was killed goes on with the same command, and cells may
be run in any order, by anyone (`run_cell`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scipy import stats

from autosparse import controls, criteria, irp, models, pruning
from autosparse import data as data_module
from autosparse.config import (
    CompareConfig,
    IRPConfig,
    SparseTrainConfig,
    check_sparsity,
    from_plain,
    plain,
    run_id,
)
from autosparse.corpus import read_run
from autosparse.data import DataSource
from autosparse.errors import UsageError, unknown
from autosparse.files import read_json, write_json
from autosparse.pruning import DENSE, Selection
from autosparse.sparse_training import RESULT, Cell, Observer, train_cell
from autosparse.ticket import Ticket
from autosparse.training import Epoch, PlainStepper, check, steps_per_epoch

IRP = "irp"
BASELINES = ("erk", "uniform")
TICKET = "ticket"
ALL_TWINS = (*controls.TWINS, *BASELINES)
SHORT = {
    controls.SHUFFLED: "shuffle",
    controls.REINITIALISED: "reinit",
    controls.INVERTED: "invert",
    "erk": "erk",
    "uniform": "unif.",
}
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Trial:
    """One training of a comparison."""

    label: str
    """A criterion, or a name that `options` says more about; a baseline; or dense."""
    twin: str
    """ticket, or what kind of twin of it."""
    sparsity: float
    seed: int

    @property
    def name(self) -> str:
        """For folders and progress bars."""
        twin = "" if self.twin == TICKET else f"-{self.twin}"
        return f"{self.label}{twin}-{self.sparsity * 100:g}-seed{self.seed}"


def labels(config: CompareConfig) -> list[str]:
    """Return the criteria to compare, by the names they have in the comparison."""
    return _listed(config.criteria, str)


def _listed(value: Any, kind: Callable[[str], Any]) -> list[Any]:
    """Return a list, or the parts of a text with commas."""
    if isinstance(value, str):
        value = [part for part in (each.strip() for each in value.split(",")) if part]
    elif not isinstance(value, list):
        value = [value]
    try:
        return [kind(each) for each in value]
    except ValueError:
        raise UsageError(f"{value} is no list of {kind.__name__}s") from None


def sparsities(config: CompareConfig) -> list[float]:
    """Return the sparsities."""
    return [check_sparsity(each) for each in _listed(config.sparsities, float)]


def seeds(config: CompareConfig) -> list[int]:
    """Return the seeds."""
    return _listed(config.seeds, int)


def criterion_of(config: CompareConfig, label: str) -> tuple[str, dict[str, Any]]:
    """Return the criterion that a label stands for, and its options."""
    options = dict(config.options.get(label, {}))
    return options.pop("criterion", "random" if label == "uniform" else label), options


def check_config(config: CompareConfig) -> None:
    """Raise UsageError for what cannot be, before anything is trained."""
    check(config.training)
    selection(config).check()
    if not labels(config) or not sparsities(config) or not seeds(config):
        raise UsageError("compare needs at least one criterion, one sparsity and one seed")
    for label in config.options:
        if label not in (*labels(config), *BASELINES):
            raise unknown("label in options", label, labels(config))
    for label in labels(config):
        name, options = criterion_of(config, label)
        if name == IRP:
            _irp_config(config, options, 0.5, 0)
        else:
            criteria.get(name).check(options)
    for twin in config.twins:
        if twin not in ALL_TWINS:
            raise unknown("twin", twin, ALL_TWINS)


def trials(config: CompareConfig) -> list[Trial]:
    """Return all trainings: per seed the dense one, every ticket with its twins, the baselines."""
    check_config(config)
    twins = [TICKET, *(twin for twin in config.twins if twin in controls.TWINS)]
    baselines = [name for name in BASELINES if name in config.twins and name not in labels(config)]
    found = []
    for seed in seeds(config):
        found.append(Trial(DENSE, TICKET, 0.0, seed))
        for sparsity in sparsities(config):
            found += [
                Trial(label, twin, sparsity, seed) for label in labels(config) for twin in twins
            ]
            found += [Trial(name, TICKET, sparsity, seed) for name in baselines]
    return found


def selection(config: CompareConfig, label: str = "") -> Selection:
    """Return how the scores of a label become masks; a uniform baseline has its own allocation."""
    if label == "uniform":
        return Selection(scope="layer", guard=config.guard)
    if label == "erk":
        return Selection(guard=config.guard)
    return Selection(config.scope, config.allocation, config.allocation_options, config.guard)


def folder_of(config: CompareConfig, trial: Trial) -> Path:
    """Return the folder of a trial's result."""
    return Path(config.out) / "cells" / f"{trial.name}-{_key(config, trial, trained=True)}"


def is_done(config: CompareConfig, trial: Trial) -> bool:
    """Return whether the trial's result is there."""
    return (folder_of(config, trial) / RESULT).is_file()


def _key(config: CompareConfig, trial: Trial, *, trained: bool) -> str:
    """Return a hash of all that makes a trial's ticket, and of its training."""
    name, options = criterion_of(config, trial.label)
    parts = [run_id(config.model), run_id(config.data), run_id(config.scoring), str(trial)]
    parts += [name, str(sorted(options.items())), str(selection(config, trial.label))]
    if trained or name == IRP:
        parts.append(run_id(config.training))
    if name not in (DENSE, IRP):
        provenance = criteria.get(name).provenance
        parts.append(str(provenance(**options)) if provenance else "")
    return run_id(config.model, *parts)


def load(config: CompareConfig) -> DataSource:
    """Return the data on the device."""
    return data_module.load(config.data).to(models.choose_device(config.device))


def run_trial(
    config: CompareConfig,
    trial: Trial,
    source: DataSource,
    *,
    observer: Observer | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> dict[str, Any]:
    """Train one trial, or find its result; `source` is what `load` gave."""
    folder = folder_of(config, trial)
    if is_done(config, trial):
        result = read_json(folder / RESULT)
    else:
        training = SparseTrainConfig(training=config.training, seed=trial.seed)
        ticket = ticket_of(config, trial, source)
        result = train_cell(
            Cell(trial.name, ticket, config.data, trial.seed, folder),
            training,
            source,
            lambda model, steps: PlainStepper(model, config.training, steps),
            device=str(models.choose_device(config.device)),
            observer=observer,
            on_epoch=on_epoch,
        )
    return {**result, "label": trial.label, "twin": trial.twin, "sparsity": trial.sparsity}


def ticket_of(config: CompareConfig, trial: Trial, source: DataSource) -> Ticket:
    """Make (or find) the ticket of a trial; twins are made from that of the ticket itself."""
    own = replace(trial, twin=TICKET)
    if trial.label == DENSE:
        model = models.create_for(source, config.model, trial.seed)
        return pruning.prune(model, source, DENSE, seed=trial.seed)
    key = f"{own.name}-{_key(config, own, trained=False)}"
    path = Path(config.out) / "tickets" / f"{key}.safetensors"
    opposite = path.with_name(f"{key}-inverted.safetensors")
    if not (path.exists() and opposite.exists()):
        ticket, twin = _make(config, own, source)
        twin.save(opposite)
        ticket.save(path)
    if trial.twin == controls.INVERTED:
        return Ticket.load(opposite)
    ticket = Ticket.load(path)
    if trial.twin == controls.SHUFFLED:
        return controls.shuffled_twin(ticket, _start(config, ticket, source, trial.seed))
    if trial.twin == controls.REINITIALISED:
        return controls.reinitialised_twin(ticket)
    return ticket


def _make(config: CompareConfig, trial: Trial, source: DataSource) -> tuple[Ticket, Ticket]:
    """Return a ticket and its inverted twin, which needs the scores."""
    name, options = criterion_of(config, trial.label)
    if name == IRP:
        return _make_by_irp(config, options, trial, source)
    model = models.create_for(source, config.model, trial.seed)
    model.to(models.choose_device(config.device))
    scored, card = pruning.score(
        model,
        source,
        name,
        trial.sparsity,
        selection=selection(config, trial.label),
        scoring=config.scoring,
        seed=trial.seed,
        options=options,
    )
    ticket = pruning.choose(model, scored, card)
    return ticket, controls.inverted_twin(ticket, model, scored.scores)


def _make_by_irp(
    config: CompareConfig, options: dict[str, Any], trial: Trial, source: DataSource
) -> tuple[Ticket, Ticket]:
    settings = _irp_config(config, options, trial.sparsity, trial.seed)
    run = read_run(irp.run_irp(settings))
    ticket = run.ticket(run.levels)
    model = _start(config, ticket, source, trial.seed)
    shape = (source.in_chans, source.image_size, source.image_size)
    ticket = replace(ticket, card=pruning.finish_card(model, ticket.masks, shape, ticket.card))
    scores = controls.survival_scores(run.survival, trial.seed)
    return ticket, controls.inverted_twin(ticket, model, scores)


def _irp_config(
    config: CompareConfig, options: dict[str, Any], sparsity: float, seed: int
) -> IRPConfig:
    """Return the IRP run that ends at `sparsity`, each level trained as tickets are."""
    settled = {
        "model": config.model,
        "data": config.data,
        "training": config.training,
        "final_density": 1 - sparsity,
        "seed": seed,
        "device": config.device,
        "out": str(Path(config.out) / "corpus"),
        "scope": config.scope,
    }
    for key in options:
        if key in settled:
            raise UsageError(f"options.irp.{key}: compare settles it itself")
    found = from_plain(IRPConfig, {**settled, **options})
    irp.check(found)
    return found


def _start(config: CompareConfig, ticket: Ticket, source: DataSource, seed: int) -> Any:
    """Return the dense model whose values the ticket keeps."""
    model = models.create_for(source, config.model, seed)
    run = ticket.card.get("options", {}).get("run_id")
    if ticket.card.get("rewind_steps") and run is not None:
        model.load_state_dict(read_run(Path(config.out) / "corpus" / run).rewound)
    return model


# Verdicts


def training_passes(config: CompareConfig, source: DataSource) -> int:
    """Return the image passes of one training."""
    steps = steps_per_epoch(source.train, config.training)
    return steps * config.training.epochs * config.training.batch_size


def table(
    config: CompareConfig, results: list[dict[str, Any]], passes: int
) -> list[dict[str, Any]]:
    """Return a row per label and sparsity, seeds taken together; `passes`: of one training.

    Accuracies are means over seeds of test accuracy (0 to 1), spreads their sample standard
    deviation; `verdict` and the intervals are paired by seed, see `verdict`.
    """
    by_cell: dict[tuple[str, str, float], dict[int, float]] = {}
    for result in results:
        key = (result["label"], result["twin"], result["sparsity"])
        by_cell.setdefault(key, {})[result["seed"]] = result["test_accuracy"]
    rows = []
    for label, twin, sparsity in by_cell:
        if twin == TICKET:
            mine = [
                each
                for each in results
                if (each["label"], each["twin"], each["sparsity"]) == (label, TICKET, sparsity)
            ]
            rows.append(_row(config, by_cell, mine, passes))
    order = {name: place for place, name in enumerate([DENSE, *labels(config), *BASELINES])}
    return sorted(rows, key=lambda row: (row["sparsity"], order[row["label"]]))


def _row(
    config: CompareConfig,
    by_cell: dict[tuple[str, str, float], dict[int, float]],
    mine: list[dict[str, Any]],
    passes: int,
) -> dict[str, Any]:
    label, sparsity = mine[0]["label"], mine[0]["sparsity"]
    own = by_cell[label, TICKET, sparsity]
    effective = [
        each["effective_density"] for each in mine if each["effective_density"] is not None
    ]
    cost = statistics.fmean(each["image_passes"] for each in mine)
    row = {
        "label": label,
        "sparsity": sparsity,
        "seeds": len(own),
        **_mean_and_spread("accuracy", own),
        "kept": mine[0]["kept"],
        "effective_density": statistics.fmean(effective) if effective else None,
        "image_passes": cost,
        "cost_share": cost / passes,
        "twins": {},
        "verdict": None,
    }
    for twin in config.twins:
        cell = (label, twin, sparsity) if twin in controls.TWINS else (twin, TICKET, sparsity)
        if cell in by_cell and label not in (DENSE, *BASELINES):
            row["twins"][twin] = {
                **_mean_and_spread("accuracy", by_cell[cell]),
                "ticket_minus_twin": paired(own, by_cell[cell]),
            }
    if label != DENSE and label not in BASELINES:
        row["verdict"] = verdict(
            own,
            by_cell.get((label, controls.SHUFFLED, sparsity)),
            by_cell.get(("uniform", TICKET, sparsity)),
        )
    return row


def _mean_and_spread(name: str, values: dict[int, float]) -> dict[str, float]:
    found = list(values.values())
    spread = statistics.stdev(found) if len(found) > 1 else 0.0
    return {name: statistics.fmean(found), "spread": spread}


def paired(first: dict[int, float], second: dict[int, float]) -> dict[str, Any]:
    """Return mean and interval of first - second, over the seeds that both have.

    The interval is Student's t for paired samples at 95 %; None with fewer than two seeds.
    """
    differences = [first[seed] - second[seed] for seed in first if seed in second]
    if not differences:
        return {"mean": None, "low": None, "high": None, "seeds": 0}
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return {"mean": mean, "low": None, "high": None, "seeds": count}
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    half = float(reach) * statistics.stdev(differences) / count**0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": count}


def verdict(
    ticket: dict[int, float], shuffled: dict[int, float] | None, uniform: dict[int, float] | None
) -> str:
    """Say in a word what a ticket's accuracy (per seed) rests on.

    `worse`: surely below its shuffled twin, or below uniform random pruning. Else `selection
    matters`: surely above its shuffled twin. Else `only allocation`: the shuffled twin is surely
    above uniform. Else `neither`. Surely: the paired 95 % interval leaves zero out.
    """
    if shuffled is None or uniform is None:
        return "no twins"
    selected, allocated = paired(ticket, shuffled), paired(shuffled, uniform)
    whole = paired(ticket, uniform)
    if any(each["low"] is None for each in (selected, allocated, whole)):
        return "one seed"
    if selected["high"] < 0 or whole["high"] < 0:
        return "worse"
    if selected["low"] > 0:
        return "selection matters"
    if allocated["low"] > 0:
        return "only allocation"
    return "neither"


def shown(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the table's rows as they are printed; all but the passes in per cent."""
    for row in rows:
        twins = {
            short: f"{row['twins'][name]['accuracy'] * 100:.1f}" if name in row["twins"] else ""
            for name, short in SHORT.items()
        }
        effective = row["effective_density"]
        yield {
            "at %": f"{row['sparsity'] * 100:g}",
            "criterion": row["label"],
            "accuracy": f"{row['accuracy'] * 100:.1f}±{row['spread'] * 100:.1f}",
            **twins,
            "verdict": row["verdict"] or "",
            "live": "" if effective is None else f"{effective * 100:.2f}",
            "passes": f"{row['image_passes']:,.0f}",
            "cost": f"{row['cost_share'] * 100:.1f}",
        }


def write_report(config: CompareConfig, rows: list[dict[str, Any]], results: list) -> Path:
    """Write comparison.json: the config, the table and every result without its history."""
    path = Path(config.out) / "comparison.json"
    kept = [{key: value for key, value in each.items() if key != "history"} for each in results]
    write_json(path, {"config": plain(config), "rows": rows, "results": kept})
    return path
