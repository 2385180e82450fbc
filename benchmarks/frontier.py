"""The figures of the documents that have labels beside their points: accuracy over cost.

docs/generate/figures.py and benchmarks/tickets.py draw with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autosparse.report.style import (
    COLOURS,
    MARKERS,
    criterion_of,
    labels_beside,
    panels,
    save,
)

FEWEST = 1e-4
"""Costs below this share of a training are drawn at it: a log axis has no zero."""


def frontier(rows: Sequence[dict[str, Any]], path: Path, title: str) -> Path:
    """Draw accuracy against the cost of finding the ticket, a point per label.

    Args:
        rows: `label`, `accuracy`, `spread` (0 to 1), `cost_share` (of the training), and `name`
            where the figure is not to say the label.
        path: the PNG to write; the data go to the CSV beside it.
        title: what was trained on what.
    """
    with panels((8, 4.8)) as (figure, grid):
        axes, items = grid[0, 0], []
        for row in rows:
            height = 100 * row["accuracy"]
            if row["label"] == "dense":
                axes.axhline(height, color=COLOURS["dense"], linestyle="--")
                axes.annotate("dense", (0.02, height), xycoords=("axes fraction", "data"),
                              xytext=(0, 4), textcoords="offset points")  # fmt: skip
                continue
            cost = max(100 * row["cost_share"], 100 * FEWEST)
            criterion = criterion_of(row["label"])
            colour = COLOURS.get(criterion, "#000000")
            axes.errorbar(
                cost, height, yerr=100 * row["spread"], linestyle="none", color=colour,
                marker=MARKERS.get(criterion, "o"), markersize=8, capsize=3,
            )  # fmt: skip
            items.append((cost, height, f"{row.get('name', row['label'])}: {height:.1f}", colour))
        axes.set_xscale("log")
        axes.set_xlabel(f"cost of the ticket, % of its training ({100 * FEWEST:g}: none)")
        axes.set_ylabel("test accuracy, %")
        axes.set_title(title, loc="left", fontsize=11)
        labels_beside(axes, items)
        return save(figure, rows, path)
