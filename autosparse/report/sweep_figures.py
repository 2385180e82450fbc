"""Figures of a sweep or comparison: accuracy, bytes and time, and densities of layers.

A row holds means over seeds for a criterion at a sparsity, with the keys label,
sparsity, seeds, accuracy, spread, checkpoint_bytes and step_seconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from autosparse.core.errors import UsageError
from autosparse.report.style import (
    COLUMN,
    DENSE,
    LABELS,
    dense_line,
    density_axis,
    labels_beside,
    looks,
    of_seeds,
    order_of,
    panels,
    save,
)

IRP = "irp"
Row = dict[str, Any]
KEYS = ("label", "sparsity", "seeds", "accuracy", "spread", "checkpoint_bytes", "step_seconds")


def accuracy_against_density(rows: Sequence[Row], path: Path, title: str) -> Path:
    """Draw test accuracy against density, a line and a band (± standard deviation) per label.

    Args:
        rows: see above; `dense` becomes a reference line, `irp` a thick one.
        path: the PNG to write; the data go to the CSV beside it.
        title: what was trained on what.
    """
    with panels((COLUMN[0] + 0.9, COLUMN[1])) as (figure, grid):
        axes = grid[0, 0]
        _draw_labels(axes, rows, "accuracy", 100, "spread")
        axes.set_ylabel("test accuracy, %")
        axes.set_ylim(*axes.get_ylim())
        labels_beside(axes, _ends(rows), 0.07)
        _title(figure, rows, title, "mean ± standard deviation")
        return save(figure, [{key: row[key] for key in KEYS} for row in rows], path)


def cost_against_density(rows: Sequence[Row], path: Path, title: str) -> Path:
    """Draw the bytes of a trained ticket and the seconds of a training step against density.

    Args:
        rows: see above; `dense` becomes the reference line.
        path: the PNG to write; the data go to the CSV beside it.
        title: what was trained on what.
    """
    measures = (
        ("checkpoint_bytes", 1e-3, "checkpoint, kB"),
        ("step_seconds", 1e3, "training step, ms"),
    )
    with panels((7.2, 3.7), columns=2) as (figure, grid):
        for axes, (key, scale, name) in zip(grid[0], measures, strict=True):
            _draw_labels(axes, rows, key, scale)
            axes.set_ylim(bottom=0)
            axes.set_ylabel(name)
        _legend(figure, grid[0, 0])
        _title(figure, rows, title)
        return save(figure, [{key: row[key] for key in KEYS} for row in rows], path)


def accuracy_against_flops(rows: Sequence[Row], path: Path, title: str) -> Path:
    """Draw test accuracy against the FLOPs of the whole training, a point per row.

    Points of a label, of all sparsities, topologies and lengths of training, have one look; the
    most accurate at their cost or less are joined.

    Args:
        rows: see above, with training_flops and training.
        path: the PNG to write; the data go to the CSV beside it.
        title: what was trained on what.
    """
    known = [row for row in rows if row.get("training_flops")]
    with panels(COLUMN) as (figure, grid):
        axes = grid[0, 0]
        for label, look, mine in _by_label(known):
            best, frontier = 0.0, []
            for row in sorted(mine, key=lambda row: (row["training_flops"], -row["accuracy"])):
                if row["accuracy"] > best:
                    best = row["accuracy"]
                    frontier.append((row["training_flops"], 100 * best))
            axes.errorbar(
                [row["training_flops"] for row in mine], [100 * row["accuracy"] for row in mine],
                yerr=[100 * row["spread"] for row in mine], color=look["color"],
                marker=look["marker"] or "o", linestyle="", markersize=6, capsize=2,
                label=_name(label),
            )  # fmt: skip
            axes.plot(*zip(*frontier, strict=True), color=look["color"], linewidth=1.2)
        axes.set_xscale("log")
        axes.set_xlabel("FLOPs of the training, layers counted by their density")
        axes.set_ylabel("test accuracy, %")
        _legend(figure, axes)
        _title(figure, known, title, "mean ± standard deviation")
        keys = ("training", *KEYS, "training_flops")
        return save(figure, [{key: row[key] for key in keys} for row in known], path)


def _draw_labels(
    axes: Any, rows: Sequence[Row], key: str, scale: float, spread: str | None = None
) -> None:
    """Draw a line per label against density: a row's `key` times `scale`, in a band of `spread`."""
    sparse = [row for row in rows if row["label"] != DENSE and row["sparsity"] > 0]
    if not sparse:
        raise UsageError("nothing sparse to draw: no cell of a criterion is finished")
    dense_line(axes, rows, key, scale, spread)
    for label, look, mine in _by_label(sparse):
        density = [1 - row["sparsity"] for row in mine]
        if spread:
            low, high = ([scale * (row[key] + sign * row[spread]) for row in mine]
                         for sign in (-1, 1))  # fmt: skip
            axes.fill_between(density, low, high, color=look["color"], alpha=0.15, linewidth=0)
        axes.plot(density, [scale * row[key] for row in mine], **look, markersize=5,
                  linewidth=2.4 if label == IRP else 1.5, label=_name(label))  # fmt: skip
    density_axis(axes, [1 - row["sparsity"] for row in sparse])


def _ends(rows: Sequence[Row]) -> list[tuple[float, float, str, str]]:
    """Return where each label's line ends, for `labels_beside`; dense at the lowest density."""
    ends = []
    lowest = 1 - max(row["sparsity"] for row in rows)
    for label, look, mine in _by_label(rows):
        height = 100 * mine[-1]["accuracy"]
        density = lowest if label == DENSE else 1 - mine[-1]["sparsity"]
        ends.append((density, height, f"{_name(label)}: {height:.1f}", look["color"]))
    return ends


def _by_label(rows: Sequence[Row]) -> Iterator[tuple[str, dict[str, Any], list[Row]]]:
    """Yield (label, look, rows from dense to sparse) per label."""
    labels = sorted({row["label"] for row in rows}, key=order_of)
    for label, look in looks(labels).items():
        mine = (row for row in rows if row["label"] == label)
        yield label, look, sorted(mine, key=lambda row: row["sparsity"])


def layer_densities(tickets: Iterable[Row], path: Path, title: str) -> Path:
    """Draw the density of every layer, layers in order, a panel per label, a line per sparsity.

    Args:
        tickets: each with label, sparsity, seed, and `layers`: its {layer: density} in order.
        path: the PNG to write; the data go to the CSV beside it, seeds taken together.
        title: what was pruned.
    """
    rows = _mean_densities(tickets)
    if not rows:
        raise UsageError("no tickets to draw layer densities of")
    labels = sorted({row["label"] for row in rows}, key=order_of)
    sparsities = sorted({row["sparsity"] for row in rows})
    lowest = min((row["density"] for row in rows if row["density"] > 0), default=1e-3)
    columns = 2 if len(labels) in (2, 4) else min(3, len(labels))
    lines = -(-len(labels) // columns)
    size = (0.9 + 2.2 * columns if columns > 1 else COLUMN[0], 1.2 + 2.1 * lines)
    with panels(size, lines, columns, sharex=True, sharey=True) as (figure, grid):
        shades = _shades(len(sparsities))
        for place, label in enumerate(labels):
            axes = grid.flat[place]
            for colour, sparsity in zip(shades, sparsities, strict=True):
                mine = [r for r in rows if (r["label"], r["sparsity"]) == (label, sparsity)]
                places = [row["layer_number"] for row in mine]
                shares = [row["density"] or None for row in mine]
                axes.plot(places, shares, color=colour, marker=".", markersize=4, linewidth=1.2,
                          label=f"{100 * (1 - sparsity):.3g} %")  # fmt: skip
            axes.set_yscale("log")
            axes.set_ylim(lowest / 1.5, 1.3)
            ticks = [tick for tick in (0.001, 0.01, 0.1, 1) if tick >= lowest / 1.5]
            axes.set_yticks(ticks, [f"{100 * tick:g}" for tick in ticks])
            axes.minorticks_off()
            axes.set_title(_name(label), fontsize=11)
        for place, axes in enumerate(grid.flat):
            if place >= len(labels):
                axes.set_axis_off()
            elif place >= len(labels) - columns:
                axes.tick_params(labelbottom=True)
                axes.set_xlabel("layer, from input to output", fontsize=10)
        handles, names = grid.flat[0].get_legend_handles_labels()
        figure.legend(
            handles, names, title="density of the model", fontsize=9, title_fontsize=9,
            loc="outside lower center", ncols=min(5, len(names)),
        )  # fmt: skip
        figure.supylabel("density of the layer, %", fontsize=11)
        figure.suptitle(title, fontsize=11)
        return save(figure, rows, path)


def _legend(figure: Any, axes: Any) -> None:
    handles, names = axes.get_legend_handles_labels()
    columns = -(-len(names) // -(-len(names) // 4))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=10)


def _title(figure: Any, rows: Sequence[Row], title: str, what: str = "mean") -> None:
    seeds = max(row["seeds"] for row in rows)
    figure.suptitle(f"{title}\n{of_seeds(seeds, what)}", fontsize=11)


def _name(label: str) -> str:
    return LABELS.get(label, label)


def _shades(count: int) -> list[Any]:
    """Return colours from bright (dense) to dark (sparse), safe for the colour-blind."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.85 * (1 - place / max(count - 1, 1))) for place in range(count)]


def _mean_densities(tickets: Iterable[Row]) -> list[Row]:
    layers_of: dict[tuple[str, float], list[dict[str, float]]] = {}
    for ticket in tickets:
        layers_of.setdefault((ticket["label"], ticket["sparsity"]), []).append(ticket["layers"])
    return [
        {"label": label, "sparsity": sparsity, "layer_number": number + 1, "layer": layer,
         "density": statistics.fmean(each[layer] for each in mine), "seeds": len(mine)}
        for (label, sparsity), mine in sorted(layers_of.items())
        for number, layer in enumerate(mine[0])
    ]  # fmt: skip
