"""What the results of a comparison say: the table, intervals paired by seed, and verdicts."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scipy import stats

from autosparse.core.config import plain
from autosparse.core.files import write_json
from autosparse.criteria.prune import DENSE
from autosparse.data.sets import DataSource
from autosparse.sparsity import twins as controls
from autosparse.study.compare import BASELINES, TICKET, labels
from autosparse.study.config import CompareConfig
from autosparse.study.results import dead, mark
from autosparse.training.loop import steps_per_epoch

SHORT = {
    controls.SHUFFLED: "shuffle",
    controls.REINITIALISED: "reinit",
    controls.INVERTED: "invert",
    "erk": "erk",
    "uniform": "unif.",
}
CONFIDENCE = 0.95


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
        "dead": dead(mine),
        **_mean_and_spread("accuracy", own),
        "validation_accuracy": statistics.fmean(each["validation_accuracy"] for each in mine),
        "kept": mine[0]["kept"],
        "density": 1 - sparsity,
        "parameters": round(statistics.fmean(each["parameters"] for each in mine)),
        "checkpoint_bytes": round(statistics.fmean(each["checkpoint_bytes"] for each in mine)),
        "step_seconds": statistics.fmean(_step_seconds(config, each) for each in mine),
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


def _step_seconds(config: CompareConfig, result: dict[str, Any]) -> float:
    """Return a training's seconds per step, validation included."""
    return result["seconds"] * config.training.batch_size / max(result["training_passes"], 1)


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
            "criterion": row["label"] + mark(row),
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
