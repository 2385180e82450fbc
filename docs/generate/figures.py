"""Draws the figures of README.md, docs/autos.md and docs/scale.md from the figures that are kept.

    python -m docs.generate.figures

The figure of each claim comes from results/claims.json, accuracy_over_sparsity.png from
results/long_trainings.json, accuracy_over_latency.png from results/accuracy_latency.json, those of
AutoS from the CSV files beside them, those of docs/scale.md from the cost model.
"""

from __future__ import annotations

import csv
from ast import literal_eval
from pathlib import Path
from typing import Any

from autosparse.report.autos_figures import calibration
from autosparse.report.style import COLOURS, LABELS, labels_beside, looks, panels, save
from benchmarks import scale_figures
from benchmarks.frontier import frontier
from docs.generate.results import LATENCY, RESNET, claims, read

DOCS = Path(__file__).parents[1]
LINES = ("autos", "synflow", "snip", "short_irp")
REFERENCE = "irp"
WAYS = {
    "dense, narrower to the left": (("dense", "width"), COLOURS["dense"], "s"),
    "narrower in all layers": ("uniform", COLOURS["irp"], "v"),
    "AutoS, 95 %: units 1, 0.5, 0": ("95_", COLOURS["autos"], "o"),
    "AutoS, 98 %: units 1, 0.5, 0": ("98_", COLOURS["random"], "D"),
    "Torch-Pruning, trained twice": ("torch_pruning", COLOURS["snip"], "^"),
}
"""Way to a quicker network -> what its rows' keys begin with, its colour and marker."""


def points() -> list[dict[str, Any]]:
    """Return accuracy and spread of every row and sparsity that is drawn, and dense."""
    net = read("long_trainings")["nets"][RESNET]
    rows = [
        {"row": row["key"], "sparsity": int(level), "accuracy": cell["mean"], "spread": cell["sd"]}
        for row in net["rows"]
        if row["key"] in (*LINES, REFERENCE)
        for level, cell in row["cells"].items()
    ]
    dense = net["dense"]
    return [
        {"row": "dense", "sparsity": 0, "accuracy": dense["mean"], "spread": dense["sd"]},
        *rows,
    ]


def accuracy_over_sparsity(path: Path) -> Path:
    """Draw accuracy over sparsity: a line per criterion, dense and full IRP as bands."""
    rows = points()
    places = sorted({row["sparsity"] for row in rows} - {0})
    order = {level: place for place, level in enumerate(places)}
    with panels((6.0, 4.6)) as (figure, grid):
        axes, items = grid[0, 0], []
        axes.set_xlim(-0.15, len(places) - 0.85)
        axes.set_ylim(43, 69.5)
        found = looks(LINES)
        for name in ("dense", REFERENCE, *LINES):
            own = sorted((r for r in rows if r["row"] == name), key=lambda r: r["sparsity"])
            if name == "dense":
                own = [{**own[0], "sparsity": level} for level in places]
            x = [order[row["sparsity"]] for row in own]
            y = [row["accuracy"] for row in own]
            low = [row["accuracy"] - max(row["spread"], 0.15) for row in own]
            high = [row["accuracy"] + max(row["spread"], 0.15) for row in own]
            axes.fill_between(x, low, high, color=COLOURS[name], alpha=0.18, linewidth=0)
            if name in found:
                axes.plot(x, y, linewidth=2, markersize=7, **found[name])
            else:
                axes.plot(x, y, linewidth=1, color=COLOURS[name], linestyle="--")
            label = {"irp": "full IRP", "dense": "dense"}.get(name, LABELS.get(name))
            last = [(a, b) for a, b in zip(x, y, strict=True) if b > 43][-1]
            text = f"{label}: {y[-1]:.1f}" + (" at 99 %" if name == "snip" else "")
            items.append((*last, text, COLOURS[name]))
        axes.set_xticks(range(len(places)), [f"{level} %" for level in places])
        axes.set_xlabel("sparsity: prunable weights removed before training")
        axes.set_ylabel("test accuracy, %")
        axes.set_title(
            f"{RESNET}, CIFAR-10 at 16 px\n8,820 steps, 3 seeds; full IRP costs five trainings",
            loc="left",
            fontsize=11,
        )
        labels_beside(axes, items, 0.06)
        return save(figure, rows, path)


def claim(said: dict[str, Any], path: Path) -> Path:
    """Draw what a claim holds against what: two points a row, the first one's name above it."""
    rows = said["figure"]["rows"]
    flat = [{"place": row["place"], **point} for row in rows for point in row["points"]]
    with panels((6.0, 1.1 + 0.46 * len(rows))) as (figure, grid):
        axes, labels = grid[0, 0], {"left": [], "right": []}
        for height, row in enumerate(rows):
            values = [point["value"] for point in row["points"]]
            lower = min(row["points"], key=lambda point: point["value"])
            axes.plot(values, [height, height], color="#BBBBBB", linewidth=2, zorder=1)
            for point in row["points"]:
                colour = COLOURS[point["look"]]
                axes.plot(point["value"], height, "o", color=colour, markersize=7)
                left = point is lower
                label = axes.annotate(
                    f"{point['name']} {point['value']:g}", (point["value"], height),
                    (-8 if left else 8, 0), textcoords="offset points", va="center",
                    ha="right" if left else "left", color=colour, fontsize=10,
                )  # fmt: skip
                label.set_in_layout(False)
                labels["left" if left else "right"].append(label)
        axes.set_yticks(range(len(rows)), [row["place"] for row in rows], fontsize=10)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(said["figure"]["axis"], fontsize=10)
        figure.canvas.draw()
        _make_room(axes, [point["value"] for point in flat], labels)
        return save(figure, flat, path)


def _make_room(axes: Any, values: list[float], labels: dict[str, list[Any]]) -> None:
    """Widen the axis until its labels fit, without ticks where no value can be."""
    left, right = (
        max(label.get_window_extent().width for label in labels[side]) + 20  # pixels
        for side in ("left", "right")
    )
    low, high = min(values), max(values)
    per_pixel = (high - low) / (axes.get_window_extent().width - left - right)
    axes.set_xlim(low - left * per_pixel, high + right * per_pixel)
    most = 100 if axes.get_xlabel().endswith("%") else 1
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= most])
    axes.set_xlim(low - left * per_pixel, high + right * per_pixel)


def accuracy_over_latency(path: Path) -> Path:
    """Draw accuracy over latency: a panel per net, a line per way to a quicker network."""
    nets = read(LATENCY)["nets"]
    flat = []
    with panels((5.0 * len(nets), 4.8), 1, len(nets)) as (figure, grid):
        for axes, (name, net) in zip(grid[0], nets.items(), strict=True):
            for way, (start, colour, marker) in WAYS.items():
                own = [row for row in net["rows"] if row["key"].startswith(start)]
                if not own:
                    continue
                own.sort(key=lambda row: row["of_dense"]["mean"])
                x = [row["of_dense"]["mean"] for row in own]
                y = [row["accuracy"]["mean"] for row in own]
                flat += [
                    {"net": name, "way": way, "row": row["label"], "of_dense": a, "accuracy": b,
                     "spread": row["accuracy"].get("sd", 0)}
                    for row, a, b in zip(own, x, y, strict=True)
                ]  # fmt: skip
                error = [row["accuracy"].get("sd", 0) for row in own]
                axes.errorbar(
                    x, y, error, color=colour, marker=marker, markersize=7, linewidth=1.5,
                    elinewidth=1, label=way,
                )  # fmt: skip
            axes.set_title(name, loc="left", fontsize=11)
            axes.set_xlabel("latency in ONNX Runtime, of the dense network's")
        grid[0, 0].set_ylabel("test accuracy, %")
        known: dict[str, Any] = {}
        for axes in grid[0]:
            handles, names = axes.get_legend_handles_labels()
            known |= dict(zip(names, handles, strict=True))
        order = [name for name in WAYS if name in known]
        figure.legend([known[name] for name in order], order, loc="outside lower center", ncols=3)
        return save(figure, flat, path)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a figure's CSV, numbers as numbers."""
    with path.open(newline="") as file:
        return [
            {
                key: value if key in ("label", "name") else literal_eval(value)
                for key, value in row.items()
            }
            for row in csv.DictReader(file)
        ]


def main() -> None:
    """Draw all of them."""
    accuracy_over_sparsity(DOCS / "accuracy_over_sparsity.png")
    accuracy_over_latency(DOCS / "accuracy_over_latency.png")
    for each in claims():
        claim(each, DOCS / "results" / f"claim_{each['id']}.png")
    for name, level, steps in (("autos_frontier", 95, "468"), ("autos_long", 98, "8,820")):
        title = f"{RESNET}, CIFAR-10 at 16 px, {level} % pruned, {steps} steps"
        frontier(rows_of(DOCS / f"{name}.csv"), DOCS / f"{name}.png", title)
    calibration(
        rows_of(DOCS / "autos_calibration.csv"), DOCS / "autos_calibration.png",
        "Seven architectures, each left out of the fit",
    )  # fmt: skip
    scale_figures.draw(DOCS)


if __name__ == "__main__":
    main()
