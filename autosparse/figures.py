"""The pictures: one style, colour-blind safe (Okabe-Ito), the data as CSV beside every PNG."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autosparse.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "autos": "#D55E00",
    "magnitude": "#0072B2",
    "snip": "#009E73",
    "synflow": "#CC79A7",
    "erk": "#E69F00",
    "random": "#56B4E9",
}
MARKERS = {"autos": "o", "magnitude": "s", "snip": "^", "synflow": "D", "erk": "v", "random": "X"}
LABELS = {"autos": "AutoS", "snip": "SNIP", "synflow": "SynFlow", "erk": "ERK"}
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.hashsalt": "autosparse",
}


def accuracy_against_sparsity(rows: Sequence[dict[str, Any]], path: Path, title: str) -> Path:
    """Draw mean test accuracy per criterion at each sparsity, bars for the spread over seeds.

    Args:
        rows: from `results.summary`; the dense row becomes the reference line.
        path: the PNG to write; the data go to the CSV beside it.
        title: what was trained on what.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
        sparse = [row for row in rows if row["criterion"] != "dense"]
        places = sorted({row["sparsity"] for row in sparse})
        criteria = sorted({row["criterion"] for row in sparse}, key=_order)
        for number, criterion in enumerate(criteria):
            _draw_criterion(axes, sparse, places, criterion, (number, len(criteria)))
        for row in rows:
            if row["criterion"] == "dense":
                _draw_dense(axes, row)
        axes.set_xticks(range(len(places)), [f"{place:.0%}" for place in places])
        axes.set_xlim(-0.5, len(places) - 0.5)
        axes.set_xlabel("sparsity (share of prunable weights removed)")
        axes.set_ylabel("test accuracy, %")
        axes.set_title(title, loc="left", fontsize=11)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return _save(figure, rows, path)


def _draw_criterion(
    axes: Any, rows: list, places: list[float], criterion: str, lane: tuple[int, int]
) -> None:
    """Points of one criterion, side by side with the others at the same sparsity."""
    number, total = lane
    mine = sorted((r for r in rows if r["criterion"] == criterion), key=lambda r: r["sparsity"])
    offset = (number - (total - 1) / 2) * 0.6 / max(total - 1, 1)
    axes.errorbar(
        [places.index(row["sparsity"]) + offset for row in mine],
        [100 * row["accuracy"] for row in mine],
        yerr=[100 * row["spread"] for row in mine],
        fmt=MARKERS.get(criterion, "o"),
        color=COLOURS.get(criterion, "#000000"),
        markersize=8,
        capsize=3,
        label=LABELS.get(criterion, criterion),
    )


def _draw_dense(axes: Any, row: dict[str, Any]) -> None:
    mean, spread = 100 * row["accuracy"], 100 * row["spread"]
    axes.axhline(mean, color="#444444", linestyle="--", linewidth=1.2, label="dense")
    axes.axhspan(mean - spread, mean + spread, color="#444444", alpha=0.12, linewidth=0)


def _order(criterion: str) -> tuple[int, str]:
    known = list(COLOURS)
    return (known.index(criterion) if criterion in known else len(known), criterion)


def _save(figure: Figure, rows: Sequence[dict[str, Any]], path: Path) -> Path:
    from matplotlib import pyplot

    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=160, format="png")
    pyplot.close(figure)
    with replacing(path.with_suffix(".csv")) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
