"""The one table of trainings: a row per model, settings, criterion and sparsity, over all seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autosparse.core.config import plain, run_id
from autosparse.core.files import write_json
from autosparse.core.progress import print_table
from autosparse.core.versions import library_versions
from autosparse.criteria.pruning import DENSE
from autosparse.sparsity import twins as controls
from autosparse.study.config import StudyConfig
from autosparse.study.grid import StudyCell
from autosparse.study.labels import BASELINES, TICKET, labels
from autosparse.study.verdicts import beginning, paired, verdict

Result = dict[str, Any]
Row = dict[str, Any]
BySeed = dict[int, float]
SHORT = {
    controls.SHUFFLED: "shuffle",
    controls.REINITIALISED: "reinit",
    controls.INVERTED: "invert",
    "erk": "erk",
    "uniform": "unif.",
}
MEANS = ("validation_accuracy", "seconds", "prune_seconds", "image_passes")
COUNTS = ("parameters", "checkpoint_bytes")
TITLE = "per cent; passes: of one image; cost: of one training"
SPARE = ("parameters", "kB", "passes", "seconds", "live")
"""Columns that a narrow terminal goes without."""


def placed(result: Result, batch_size: int | None = None) -> Result:
    """Return the result of a ticket outside of any study with the keys that the table needs."""
    place = {"label": result["criterion"], "twin": TICKET, "training": "", "contest": None}
    return {**place, "batch_size": batch_size, **result}


def table(cells: Iterable[StudyCell]) -> list[Row]:
    """Return the rows of a study's finished cells."""
    finished = [cell for cell in cells if cell.state == "finished"]
    groups: dict[tuple[str, str], list[StudyCell]] = {}
    for cell in finished:
        groups.setdefault((run_id(cell.config.model), str(cell.point)), []).append(cell)
    shared = [cell for cell in finished if cell.label in (DENSE, *BASELINES)]
    made, names = [], list(dict.fromkeys(model for model, _ in groups))
    for (model, _), mine in groups.items():
        config = mine[0].config
        results = [
            {**each, "batch_size": config.training.batch_size}
            for each in [*(cell.result() for cell in mine), *_also(mine, shared)]
        ]
        order = [DENSE, *labels(config), *BASELINES]
        made += [(names.index(model), row) for row in rows(results, order, config.twins)]
    return [row for _, row in sorted(made, key=lambda each: (each[0], each[1]["sparsity"]))]


def _also(mine: list[StudyCell], shared: list[StudyCell]) -> Iterator[Result]:
    """Yield results of other groups' controls that are the same training in this group."""
    known, first = {cell.key for cell in mine}, mine[0]
    for cell in shared:
        moved = replace(cell, config=first.config, point=first.point)
        same = moved.training == cell.training if cell.label == DENSE else moved.key == cell.key
        if cell.key not in known and same:
            yield {**cell.result(), "training": moved.place["training"]}


def rows(results: Sequence[Result], order: Sequence[str] = (), twins: Sequence[str] = ()) -> list:
    """Return a row per (model, settings, label, sparsity) of tickets, seeds taken together.

    Args:
        results: of trainings, each with label, twin, training, sparsity and seed.
        order: labels at one sparsity come in this order; without, the most accurate first.
        twins: the controls that tickets are held against.

    Accuracies are means over seeds of test accuracy (0 to 1), `spread` their sample standard
    deviation (0 for one seed). `verdict` and the intervals are paired by seed, see verdicts.py.
    """
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        key = tuple(result[name] for name in ("model", "training", "label", "twin", "sparsity"))
        groups.setdefault(key, []).append(result)
    made = [
        {**_row(mine), **_against(groups, key, twins)}
        for key, mine in groups.items()
        if key[3] == TICKET
    ]
    place = {label: number for number, label in enumerate(order)}
    return sorted(made, key=lambda row: (
        row["model"], row["sparsity"], place.get(row["label"], len(place)),
        0 if order else -row["accuracy"],
    ))  # fmt: skip


def _row(mine: list[Result]) -> Row:
    """Return the means of one group of tickets."""
    effective = [each["effective_density"] for each in mine
                 if each.get("effective_density") is not None]  # fmt: skip
    # Results of earlier versions say nothing of them.
    flops = [each["training_flops"] for each in mine if each.get("training_flops")]
    first = mine[0]
    return {
        **{key: first[key] for key in ("model", "training", "contest", "label", "sparsity")},
        "seeds": len(mine),
        "dead": dead(mine),
        **_accuracy([each["test_accuracy"] for each in mine]),
        "kept": first.get("kept"),
        "density": 1 - first["sparsity"],
        **{key: _mean(mine, key) for key in MEANS},
        **{key: round(_mean(mine, key)) for key in COUNTS},
        "step_seconds": statistics.fmean(_step_seconds(each) for each in mine),
        "effective_density": statistics.fmean(effective) if effective else None,
        "training_flops": statistics.fmean(flops) if flops else None,
        "cost_share": statistics.fmean(
            each.get("image_passes", 0.0) / max(each.get("training_passes", 0), 1) for each in mine
        ),
    }


def _against(groups: dict[tuple, list[Result]], key: tuple, twins: Sequence[str]) -> Row:
    """Return how a ticket compares with its twins, and the verdict."""
    *place, label, _, sparsity = key
    if label == DENSE or label in BASELINES:
        return {"twins": {}, "verdict": None}

    def of(label: str, twin: str) -> BySeed | None:
        theirs = groups.get((*place, label, twin, sparsity))
        return _by_seed(theirs) if theirs else None

    own, twins_of = _by_seed(groups[key]), {}
    for twin in twins:
        theirs = of(label, twin) if twin in controls.TWINS else of(twin, TICKET)
        if theirs:
            twins_of[twin] = {
                **_accuracy(list(theirs.values())),
                "ticket_minus_twin": paired(own, theirs),
            }
    said = verdict(own, of(label, controls.SHUFFLED), of("uniform", TICKET))
    moved = "topology" in groups[key][0]
    others = {name: of(name, TICKET) for name in BASELINES} if moved else {}
    return {
        "twins": twins_of,
        "verdict": said,
        **({"beginning": beginning(own, others)} if moved else {}),
    }


def _by_seed(results: list[Result]) -> BySeed:
    return {each["seed"]: each["test_accuracy"] for each in results}


def _accuracy(accuracies: list[float]) -> dict[str, float]:
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    return {"accuracy": statistics.fmean(accuracies), "spread": spread}


def _mean(results: list[Result], key: str) -> float:
    return statistics.fmean(each.get(key) or 0.0 for each in results)


def _step_seconds(result: Result) -> float:
    """Return a training's seconds per step, validation included."""
    return (
        result["seconds"] * (result["batch_size"] or 0) / max(result.get("training_passes", 0), 1)
    )


def dead(results: Iterable[Result]) -> int:
    """Return how many results are of tickets whose output does not depend on the image."""
    return sum(result.get("effective_density") == 0 for result in results)


def mark(row: Row) -> str:
    """Return the mark after a criterion's name if its tickets are dead."""
    if not row["dead"]:
        return ""
    return " (dead)" if row["dead"] == row["seeds"] else f" ({row['dead']} of {row['seeds']} dead)"


# What is shown


def show(made: Sequence[Row]) -> None:
    """Print the table."""
    print_table(list(shown(made)), TITLE, SPARE)


def shown(made: Sequence[Row]) -> Iterator[dict[str, str]]:
    """Yield the rows as they are printed, without columns in which all rows say the same."""
    lines = [_line(row) for row in made]
    same = {key for key in ("model", "training") if len({row.get(key) for row in made}) < 2}
    empty = {key for key in (lines[0] if lines else {})
             if all(line[key] in ("", "no twins") for line in lines)}  # fmt: skip
    for line in lines:
        yield {key: value for key, value in line.items() if key not in same | empty}


def _line(row: Row) -> dict[str, str]:
    twins = {
        short: f"{row['twins'][name]['accuracy'] * 100:.1f}" if name in row["twins"] else ""
        for name, short in SHORT.items()
    }
    effective = row["effective_density"]
    return {
        "model": row.get("model", ""),
        "training": row.get("training") or "-",
        "at %": f"{row['sparsity'] * 100:g}",
        "criterion": row["label"] + mark(row),
        "accuracy": f"{row['accuracy'] * 100:.1f}±{row['spread'] * 100:.1f}",
        **twins,
        "verdict": row["verdict"] or "",
        "beginning": row.get("beginning", ""),
        "live": "" if effective is None else f"{effective * 100:.2f}",
        "passes": f"{row['image_passes']:,.0f}",
        "cost": f"{row['cost_share'] * 100:.1f}",
    }


def show_trainings(results: Iterable[Result]) -> None:
    """Print the table of tickets that were trained, with their sizes."""
    made = rows([placed(each) for each in results])
    sizes = [
        {"parameters": f"{row['parameters']:,}", "kB": f"{row['checkpoint_bytes'] / 1e3:,.0f}",
         "seconds": f"{row['seconds']:.1f}"}
        for row in made
    ]  # fmt: skip
    lines = [line | size for line, size in zip(shown(made), sizes, strict=True)]
    print_table(lines, f"{TITLE}; seconds: of one training", SPARE)


# What is best, and what is written


def best(made: Sequence[Row]) -> list[Row]:
    """Return the row with the best validation accuracy of each contest, label and sparsity."""
    return best_of(made, lambda row: (row["contest"], row["label"], row["sparsity"]))


def best_results(results: Iterable[Result]) -> list[Result]:
    """Return the best ticket's result of each contest and sparsity, by validation accuracy.

    They are sorted by model and sparsity. Dense networks and twins do not compete.
    """
    tickets = [each for each in results if each["twin"] == TICKET and each["label"] != DENSE]
    chosen = best_of(tickets, lambda each: (each["contest"], each["sparsity"]))
    return sorted(chosen, key=lambda each: (each["model"], each["sparsity"]))


def best_of(candidates: Iterable[Row], of: Callable[[Row], tuple]) -> list[Row]:
    """Return the first row with the best validation accuracy of those that share `of`."""
    chosen: dict[tuple, Row] = {}
    for row in candidates:
        before = chosen.setdefault(of(row), row)
        if row["validation_accuracy"] > before["validation_accuracy"]:
            chosen[of(row)] = row
    return list(chosen.values())


def write_report(config: StudyConfig, made: Sequence[Row], cells: Sequence[StudyCell]) -> Path:
    """Write settings, table, every result without its history, and what is missing, as JSON."""
    path = Path(config.out) / config.report
    results = [
        {key: value for key, value in cell.result().items() if key != "history"}
        for cell in cells if cell.state == "finished"
    ]  # fmt: skip
    write_json(path, {
        "config": plain(replace(config, out="")),
        "rows": list(made),
        "results": results,
        "stopped": [
            {"cell": cell.key, "epochs": len(cell.history())}
            for cell in cells if cell.state == "stopped"
        ],
        "failed": {cell.key: cell.error() for cell in cells if cell.state == "failed"},
        "versions": library_versions(),
    })  # fmt: skip
    return path
