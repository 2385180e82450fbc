"""The figure of a comparison: a ticket and its twins beside each other at each sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autosparse.report.style import (
    COLOURS,
    LABELS,
    MARKERS,
    criterion_of,
    dense_line,
    of_seeds,
    panels,
    save,
)

TWIN_STYLE = {
    "ticket": ("", "o", "-"),
    "shuffled": ("#555555", "s", "--"),
    "reinitialised": ("#888888", "^", "--"),
    "inverted": ("#AAAAAA", "P", "--"),
    "erk": (COLOURS["erk"], MARKERS["erk"], ":"),
    "uniform": (COLOURS["uniform"], MARKERS["uniform"], ":"),
}
"""Twin -> colour, marker, line. A ticket has its criterion's colour, its own twins are grey."""
TWIN_LABELS = {
    "shuffled": "shuffled in layers",
    "reinitialised": "weights drawn anew",
    "inverted": "lowest scores",
    "erk": "ERK",
    "uniform": "uniform random",
}


def comparison(rows: Sequence[dict[str, Any]], path: Path, title: str) -> Path:
    """Draw a panel per criterion: the ticket and its twins at each sparsity, spread over seeds.

    Args:
        rows: from `table.table`; the dense row becomes the reference line.
        path: the PNG to write; the data go to the CSV beside it.
        title: what was trained on what.
    """
    labels = list(dict.fromkeys(row["label"] for row in rows if row["twins"] and row["verdict"]))
    labels = labels or list(dict.fromkeys(r["label"] for r in rows if r["label"] != "dense"))
    places = sorted({row["sparsity"] for row in rows if row["label"] != "dense"})
    columns = min(3, len(labels))
    lines = -(-len(labels) // columns)
    size = (max(7.5, 0.8 + 3.1 * columns), 1.4 + 2.6 * lines)
    with panels(size, lines, columns, sharex=True, sharey=True) as (figure, grid):
        for axes, label in zip(grid.flat, labels, strict=False):
            mine = [row for row in rows if row["label"] == label]
            _draw_panel(axes, mine, places)
            dense_line(axes, rows, "accuracy", 100, "spread")
            axes.set_title(LABELS.get(label, label), fontsize=11)
        for axes in list(grid.flat)[len(labels) :]:
            axes.set_axis_off()
        handles, names = grid.flat[0].get_legend_handles_labels()
        figure.legend(
            handles, names, loc="outside lower center", ncols=min(4, len(names)), fontsize=10
        )
        for axes in grid[-1]:
            axes.set_xlabel("sparsity", fontsize=11)
        figure.supylabel("test accuracy, %", fontsize=11)
        seeds = max(row["seeds"] for row in rows)
        figure.suptitle(f"{title}, {of_seeds(seeds)}", fontsize=11)
        flat = [
            {**{k: v for k, v in row.items() if k != "twins"}, **_flat_twins(row)} for row in rows
        ]
        return save(figure, flat, path)


def _draw_panel(axes: Any, rows: list[dict[str, Any]], places: list[float]) -> None:
    rows = sorted(rows, key=lambda row: row["sparsity"])
    kinds = ["ticket", *(name for name in TWIN_STYLE if any(name in row["twins"] for row in rows))]
    for number, kind in enumerate(kinds):
        reached = [(r["sparsity"], r if kind == "ticket" else r["twins"].get(kind)) for r in rows]
        points = [(sparsity, each) for sparsity, each in reached if each is not None]
        colour, marker, line = TWIN_STYLE[kind]
        colour = colour or COLOURS.get(criterion_of(rows[0]["label"]), "#000000")
        offset = (number - (len(kinds) - 1) / 2) * 0.08
        axes.errorbar(
            [places.index(sparsity) + offset for sparsity, _ in points],
            [100 * each["accuracy"] for _, each in points],
            yerr=[100 * each["spread"] for _, each in points],
            color=colour, marker=marker, linestyle=line, markersize=6, capsize=2,
            linewidth=1.4 if kind == "ticket" else 1.0,
            label="the ticket (in its colour)" if kind == "ticket" else TWIN_LABELS[kind],
        )  # fmt: skip
    axes.set_xticks(range(len(places)), [f"{100 * place:g} %" for place in places])
    axes.set_xlim(-0.5, len(places) - 0.5)


def _flat_twins(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row's twins as columns of the CSV."""
    return {
        f"{name}_{key}": row["twins"][name][key] if name in row["twins"] else None
        for name in TWIN_LABELS
        for key in ("accuracy", "spread")
    }
