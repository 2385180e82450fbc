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
    "cts": "#44AA99",
}
"""Criterion -> its colour, the same in every figure."""
MARKERS = {"autos": "o", "magnitude": "s", "snip": "^", "synflow": "D", "erk": "v", "random": "X",
           "uniform": "X", "irp": "*", "lamp": "P", "grasp": "h", "iter_snip": ">",
           "short_irp": "p", "autos_irp": "d", "cts": "<"}  # fmt: skip
LABELS = {
    "autos": "AutoS", "snip": "SNIP", "synflow": "SynFlow", "erk": "ERK", "irp": "IRP",
    "uniform": "uniform random", "grasp": "GraSP", "lamp": "LAMP", "iter_snip": "iterative SNIP",
    "force": "FORCE", "prospr": "ProsPr", "ntk_sap": "NTK-SAP", "px": "PX", "fisher": "Fisher",
    "short_irp": "short IRP", "autos_irp": "AutoS IRP", "cts": "CTS",
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


def criterion_of(label: str) -> str:
    """Return the criterion that a row's label is a variant of: autos_irp_100 -> autos_irp."""
    other = "short_irp" if label.startswith("short_") else label
    return max((each for each in COLOURS if label.startswith(each)), key=len, default=other)


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
    heights = [0.0] * len(places)
    for group in groups:
        for rank, index in enumerate(group):
            heights[index] = _low(group, places, apart) + rank * apart
    return heights


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
    (left, right), log = axes.get_xlim(), axes.get_xscale() == "log"
    outside = right * (right / left) ** 0.04 if log else right + 0.04 * (right - left)
    logarithmic = axes.get_yscale() == "log"
    height = math.log if logarithmic else float
    bottom, top = map(height, axes.get_ylim())
    places = spread([height(y) for _, y, _, _ in items], apart * (top - bottom))
    for (x, y, text, colour), place in zip(items, places, strict=True):
        axes.annotate(
            text, (x, y), (outside, math.exp(place) if logarithmic else place),
            color=colour, fontsize=10, va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 5,
                        "alpha": 0.6, "relpos": (0, 0.5)},
        )  # fmt: skip


def of_seeds(seeds: int, what: str = "mean ± standard deviation") -> str:
    """Return what a title says of how many seeds a figure shows."""
    return f"{what} of {seeds} seeds" if seeds > 1 else "one seed"


def order_of(name: str) -> tuple[int, str]:
    """Return where a criterion comes in legends: AutoS first, then as in COLOURS."""
    known = list(COLOURS)
    return (known.index(name) if name in known else len(known), name)


@contextmanager
def panels(
    size: tuple[float, float] = COLUMN, lines: int = 1, columns: int = 1, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """Give a figure and its grid of axes [lines, columns], in the style."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)  # So that `figure.canvas.draw()` places and measures texts.
        yield figure, figure.subplots(lines, columns, squeeze=False, **options)


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
    low, high = min(places), max(places)
    margin = (high / low) ** 0.06 if high > low else 1.5
    axes.set_xlim(high * margin, low / margin)  # first: a single place has no width of its own
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(**ticks)
    axes.set_xlabel("density: prunable weights kept, %")


def save(figure: Figure, rows: Sequence[dict[str, Any]], path: Path, dpi: int = 160) -> Path:
    """Write the PNG, and the data as CSV beside it."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")
    with replacing(path.with_suffix(".csv")) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
