"""From the results of many cells to one table: mean ± spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from autosparse.core.progress import print_table

Result = dict[str, Any]


def summary(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Return a row per (model, criterion, sparsity), seeds taken together.

    `accuracy` is the mean test accuracy (0 to 1), `spread` the standard deviation over seeds
    (sample, n - 1; 0 for one seed). Dense first, then by sparsity, best first.
    """
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        key = (result["model"], result["sparsity"], result["criterion"])
        groups.setdefault(key, []).append(result)
    rows = [
        {
            "model": model,
            "criterion": criterion,
            "sparsity": sparsity,
            "accuracy": statistics.fmean(r["test_accuracy"] for r in group),
            "spread": _spread([r["test_accuracy"] for r in group]),
            "seeds": len(group),
            "dead": dead(group),
            "parameters": round(statistics.fmean(r["parameters"] for r in group)),
            "checkpoint_bytes": round(statistics.fmean(r["checkpoint_bytes"] for r in group)),
            "seconds": statistics.fmean(r["seconds"] for r in group),
            "prune_seconds": statistics.fmean(r["prune_seconds"] for r in group),
            "image_passes": statistics.fmean(r.get("image_passes", 0.0) for r in group),
            "cost_share": statistics.fmean(_cost_share(r) for r in group),
        }
        for (model, sparsity, criterion), group in groups.items()
    ]
    return sorted(rows, key=lambda row: (row["model"], row["sparsity"], -row["accuracy"]))


def dead(results: Iterable[Result]) -> int:
    """Return how many results are of tickets whose output does not depend on the image."""
    return sum(result.get("effective_density") == 0 for result in results)


def mark(row: dict[str, Any]) -> str:
    """Return what stands behind a criterion's name in a table where its tickets are dead."""
    if not row["dead"]:
        return ""
    return " (dead)" if row["dead"] == row["seeds"] else f" ({row['dead']} of {row['seeds']} dead)"


def _cost_share(result: Result) -> float:
    """Return what the ticket cost as a share of its training."""
    return result.get("image_passes", 0.0) / max(result.get("training_passes", 0), 1)


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def show(results: Iterable[Result]) -> None:
    """Print the summary as a table.

    `passes` are what the ticket cost, in forward-backward passes of one image; `cost` is their
    share of one training.
    """
    print_table(
        [
            {
                "model": row["model"],
                "criterion": row["criterion"] + mark(row),
                "sparsity": f"{row['sparsity']:.1%}",
                "test accuracy": f"{row['accuracy']:.1%} ± {row['spread']:.1%}",
                "seeds": row["seeds"],
                "parameters": row["parameters"],
                "checkpoint": f"{row['checkpoint_bytes'] / 1e3:,.0f} kB",
                "training": f"{row['seconds']:.1f} s",
                "passes": f"{row['image_passes']:,.0f}",
                "cost": f"{row['cost_share']:.1%}",
            }
            for row in summary(results)
        ]
    )
