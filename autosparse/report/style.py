"""The style of all figures: legible at column width, safe for the colour-blind, with their CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autosparse.core.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DENSE = "dense"
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
COLOURS = {
    "autos": "#D55E00",
    "magnitude": "#0072B2",
    "snip": "#009E73",
    "synflow": "#CC79A7",
    "erk": "#E69F00",
    "random": "#56B4E9",
    "uniform": "#56B4E9",
    "irp": "#000000",
    "dense": "#444444",
    "lamp": "#332288",
    "grasp": "#882255",
    "iter_snip": "#117733",
    "short_irp": "#777777",
    "autos_irp": "#A03A00",
}
"""Criterion -> its colour, the same in every figure."""
MARKERS = {"autos": "o", "magnitude": "s", "snip": "^", "synflow": "D", "erk": "v", "random": "X",
           "uniform": "X", "irp": "*", "lamp": "P", "grasp": "h", "iter_snip": ">",
           "short_irp": "p", "autos_irp": "d"}  # fmt: skip
LABELS = {
    "autos": "AutoS", "snip": "SNIP", "synflow": "SynFlow", "erk": "ERK", "irp": "IRP",
    "uniform": "uniform random", "grasp": "GraSP", "lamp": "LAMP", "iter_snip": "iterative SNIP",
    "force": "FORCE", "prospr": "ProsPr", "ntk_sap": "NTK-SAP", "px": "PX", "fisher": "Fisher",
    "short_irp": "short IRP", "autos_irp": "AutoS IRP",
}  # fmt: skip
OTHER_MARKERS = ("P", "h", "<", ">", "p", "d")
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.hashsalt": "autosparse",
}
COLUMN = (5.6, 3.9)
"""Inches of a figure for one column: at 3.4 inches its text is still 6.5 points high."""


def looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return colour, marker and line style of every name; known ones always look the same."""
    look_of: dict[str, dict[str, Any]] = {}
    used = {COLOURS[name] for name in names if name in COLOURS}
    free = [colour for colour in OKABE_ITO if colour not in used] or list(OKABE_ITO)
    others = 0
    for name in names:
        if name in COLOURS:
            line = ":" if name in ("random", "uniform", "erk") else "-"
            look_of[name] = {"color": COLOURS[name], "marker": MARKERS.get(name), "linestyle": line}
        else:
            line = "-" if others < len(free) else "--"
            look_of[name] = {
                "color": free[others % len(free)],
                "marker": OTHER_MARKERS[others % len(OTHER_MARKERS)],
                "linestyle": line,
            }
            others += 1
    return look_of


def order_of(name: str) -> tuple[int, str]:
    """Return where a criterion comes in legends: AutoS first, then as in COLOURS."""
    known = list(COLOURS)
    return (known.index(name) if name in known else len(known), name)


@contextmanager
def panels(
    size: tuple[float, float] = COLUMN, lines: int = 1, columns: int = 1, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """Give a figure and its grid of axes [lines, columns], in the style."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        yield pyplot.subplots(
            lines, columns, figsize=size, squeeze=False, layout="constrained", **options
        )


def density_ticks(lowest: float) -> dict[str, list]:
    """Return about 3 to 10 places from `lowest` to 1 for a log axis, round ones if possible."""
    powers = [10.0**power for power in range(math.floor(math.log10(lowest)), 1)]
    ticks = [step * p for p in powers for step in (1, 2, 5) if 0.99 * lowest <= step * p <= 1]
    if len(ticks) > 10:
        ticks = [tick for tick in ticks if tick in powers]
    ticks = ticks if len(ticks) > 2 else [lowest, (lowest + 1) / 2, 1.0]
    return {"ticks": ticks, "labels": [f"{100 * tick:.3g} %" for tick in ticks]}


def dense_line(
    axes: Any, rows: Sequence[dict[str, Any]], key: str, scale: float, spread: str | None = None
) -> None:
    """Draw what the dense model of a table reached as a line across, with a band of its spread.

    Args:
        axes: of one panel.
        rows: a table's; nothing is drawn where none is dense.
        key: what is drawn, times `scale`.
        spread: its standard deviation's key.
    """
    for row in rows:
        if row["label"] == DENSE:
            middle, reach = scale * row[key], scale * row[spread] if spread else 0.0
            axes.axhline(middle, color=COLOURS[DENSE], linestyle="--", linewidth=1.2, label=DENSE)
            axes.axhspan(
                middle - reach, middle + reach, color=COLOURS[DENSE], alpha=0.12, linewidth=0
            )


def density_axis(axes: Any, densities: Sequence[float]) -> None:
    """Make x a log axis of densities, the densest at the left, ticks where there are points."""
    places = sorted(set(densities))
    if len(places) > 7:
        ticks = density_ticks(places[0])
    else:
        ticks = {"ticks": places, "labels": [f"{100 * place:.3g}" for place in places]}
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(**ticks)
    low, high = min(places), max(places)
    margin = (high / low) ** 0.06 if high > low else 1.5
    axes.set_xlim(high * margin, low / margin)
    axes.set_xlabel("density: prunable weights kept, %")


def save(figure: Figure, rows: Sequence[dict[str, Any]], path: Path, dpi: int = 160) -> Path:
    """Write the PNG, and the data as CSV beside it; close the figure."""
    from matplotlib import pyplot

    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")
    pyplot.close(figure)
    with replacing(path.with_suffix(".csv")) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
