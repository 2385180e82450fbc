"""The figures of the documents that have labels beside their points: accuracy over cost.

docs/generate/figures.py and benchmarks/tickets.py draw with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autosparse.report.style import COLOURS, MARKERS, panels, save

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


def criterion_of(label: str) -> str:
    """Return the criterion that a row's label is a variant of: autos_irp_100 -> autos_irp."""
    known = sorted((each for each in COLOURS if label.startswith(each)), key=len)
    return known[-1] if known else "short_irp" if label.startswith("short_") else label


def spread(places: Sequence[float], apart: float) -> list[float]:
    """Return the places moved as little as it takes for neighbours to be `apart`, in their order.

    For labels beside the ends of lines: what is near each other is moved away from its middle.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(places)), key=lambda each: places[each]):
        groups.append([index])
        while len(groups) > 1 and _low(groups[-1], places, apart) < apart + _high(
            groups[-2], places, apart
        ):
            groups[-2:] = [groups[-2] + groups[-1]]
    found = [0.0] * len(places)
    for group in groups:
        for rank, index in enumerate(group):
            found[index] = _low(group, places, apart) + rank * apart
    return found


def _low(group: Sequence[int], places: Sequence[float], apart: float) -> float:
    """Return where the lowest label of a group goes, so that its middle stays."""
    return sum(places[index] for index in group) / len(group) - (len(group) - 1) * apart / 2


def _high(group: Sequence[int], places: Sequence[float], apart: float) -> float:
    return _low(group, places, apart) + (len(group) - 1) * apart


def labels_beside(
    axes: Any, items: Sequence[tuple[float, float, str, str]], apart: float = 0.05
) -> None:
    """Write labels right of the axes, each joined to its point by a thin line.

    Args:
        axes: with their limits set already.
        items: (x, y, text, colour) of each point.
        apart: least distance of labels, as a share of the axes' height.
    """
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    height, log = top - bottom, axes.get_xscale() == "log"
    outside = right * (right / left) ** 0.04 if log else right + 0.04 * (right - left)
    for (x, y, text, colour), place in zip(
        items, spread([y for _, y, _, _ in items], apart * height), strict=True
    ):
        axes.annotate(
            text, (x, y), (outside, place), color=colour, fontsize=10, va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 5,
                        "alpha": 0.6, "relpos": (0, 0.5)},
        )  # fmt: skip
