"""Figures of a corpus: accuracy over levels, which weights survive, and densities of layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autosparse.core.errors import UsageError
from autosparse.corpus.store import IRPRun
from autosparse.report.style import OKABE_ITO, density_ticks, panels, save
from autosparse.sparsity import masks

COLUMNS = ("run_id", "model", "data", "seed", "label", "level", "density", "accuracy")
LINES, POINTS = ("-", "--", ":"), ("o", "s", "^", "D", "v", "X", "P", "*")
BINS = 20
MOST_RUNS, MOST_LAYERS, MOST_LEVELS, LONGEST = 24, 40, 20, 48
"""Most runs, layers and levels that get a label each, and the longest name of a layer."""


def level_curves(rows: Sequence[dict[str, Any]], path: Path, title: str) -> Path:
    """Draw validation accuracy against density, dense at the left, a line per run.

    Args:
        rows: one per run and level, with COLUMNS; density and accuracy are shares of 1.
        path: the PNG to write; the data go to the CSV beside it.
        title: which corpus this is.
    """
    if not rows:
        raise UsageError("no levels to draw: the level curves need at least one run")
    rows = [{key: row[key] for key in COLUMNS} for row in rows]
    runs: dict[str, list[dict[str, Any]]] = {row["run_id"]: [] for row in rows}
    for row in sorted(rows, key=lambda row: row["level"]):
        runs[row["run_id"]].append(row)
    named = len(runs) <= MOST_RUNS
    size = (8, max(4.2, 1.2 + 0.21 * len(runs)) if named else 4.2)
    with panels(size) as (figure, grid):
        axes = grid[0, 0]
        (_draw_named if named else _draw_many)(axes, list(runs.values()))
        axes.set_xscale("log")
        axes.set_xticks(**density_ticks(min(row["density"] for row in rows)))
        axes.minorticks_off()
        axes.invert_xaxis()
        axes.set(xlabel="density (share of prunable weights left)", ylabel="validation accuracy, %")
        axes.set_title(title, loc="left", fontsize=11)
        handles, names = axes.get_legend_handles_labels()
        order = sorted(range(len(names)), key=lambda place: names[place])
        figure.legend(
            [handles[place] for place in order], [names[place] for place in order],
            loc="outside right center", fontsize=9,
        )  # fmt: skip
        return save(figure, rows, path)


def survival_map(runs: Iterable[tuple[IRPRun, dict[str, Tensor]]], path: Path, title: str) -> Path:
    """Draw mean survival over the ranks of |initial weight| and |gradient at init| in the layer.

    Args:
        runs: each with the gradient at init of every prunable parameter; gone through once, so
            with a generator only one run is in memory at a time.
        path: the PNG to write; the data go to the CSV beside it, a row per bin of width 1 / BINS.
        title: which corpus this is; the numbers of runs and weights are put below.
    """
    number, weights, survived = 0, torch.zeros(BINS**2).long(), torch.zeros(BINS**2).double()
    for run, gradients in runs:
        number += 1
        for name, survival in run.survival.items():
            place = _bins(run, run.initial, name) * BINS + _bins(run, gradients, name)
            weights += place.bincount(minlength=BINS**2)
            survived += place.bincount(survival.cpu().flatten().double(), BINS**2) / run.levels
    if not weights.any():
        raise UsageError("no weights to draw: the survival map needs at least one run")
    mean = (survived / weights).view(BINS, BINS).numpy()
    rows = [
        {"weight_rank_from": x / BINS, "gradient_rank_from": y / BINS,
         "weights": count, "mean_survival": mean[x, y] if count else None}
        for (x, y), count in zip(np.ndindex(BINS, BINS), weights.tolist(), strict=True)
    ]  # fmt: skip
    counts = f"{number} {'run' if number == 1 else 'runs'}, {int(weights.sum()):,} weights"
    with _canvas((6.2, 5.2), f"{title}\n{counts}") as (figure, axes):
        edges, shown = np.linspace(0, 1, BINS + 1), np.ma.masked_invalid(mean.T)
        mesh = axes.pcolormesh(edges, edges, shown, vmin=0, vmax=shown.max() or 1)
        figure.colorbar(mesh, ax=axes, label="mean share of levels survived")
        axes.set_aspect("equal")
        axes.set_xlabel("rank of |initial weight| in its layer (1: largest)")
        axes.set_ylabel("rank of |gradient at init| in its layer")
        return save(figure, rows, path)


def layer_densities(run: IRPRun, path: Path, title: str) -> Path:
    """Draw the density of each layer (x) at each level (y) as a heat-map.

    Args:
        run: a finished run.
        path: the PNG to write; the data go to the CSV beside it, a row per level and layer.
        title: which run this is.
    """
    if not run.survival:
        raise UsageError("no layers to draw: the run has no prunable parameter")
    counts = [s.cpu().flatten().bincount(minlength=run.levels + 1) for s in run.survival.values()]
    kept = torch.stack(counts, 1).flip(0).cumsum(0).flip(0).numpy()
    density, whole = kept / kept[0], kept.sum(1) / kept[0].sum()
    rows = [
        {"level": level, "layer": name, "kept": count, "density": count / whole_layer}
        for level, counts in enumerate(kept.tolist())
        for name, count, whole_layer in zip(run.survival, counts, kept[0].tolist(), strict=True)
    ]
    levels, layers = kept.shape
    size = (min(max(2.8 + 0.22 * layers, 6), 12), min(max(2.8 + 0.22 * levels, 4), 8))
    lowest = min(density[density > 0].min(), 0.5)
    with _canvas(size, title) as (figure, axes):
        shown = np.ma.masked_equal(density, 0)
        image = axes.imshow(
            shown, "viridis", "log", vmin=lowest, vmax=1, aspect="auto", interpolation="none"
        )
        bar = figure.colorbar(image, ax=axes, label="density of the layer (white: empty)")
        bar.set_ticks(**density_ticks(lowest))
        bar.minorticks_off()
        names = [name.removesuffix(".weight")[-LONGEST:] for name in run.survival]
        every = -(-layers // MOST_LAYERS)
        axes.set_xticks(range(0, layers, every), names[::every], rotation=90, fontsize=8)
        names = [f"{level}: {100 * share:.3g} %" for level, share in enumerate(whole)]
        every = -(-levels // MOST_LEVELS)
        axes.set_yticks(range(0, levels, every), names[::every], fontsize=9)
        axes.set_ylabel("level: density of the model")
        return save(figure, rows, path)


@contextmanager
def _canvas(size: tuple[float, float], title: str) -> Iterator[tuple[Any, Any]]:
    """Give a figure with one panel for a heat map, without grid lines."""
    with panels(size) as (figure, grid):
        axes = grid[0, 0]
        axes.grid(False)
        axes.set_title(title, loc="left", fontsize=11)
        yield figure, axes


def _draw_named(axes: Any, runs: list[list[dict[str, Any]]]) -> None:
    """Colour and line style tell models apart, markers also the runs of one model."""
    heads = [run[0] for run in runs]
    models = list(dict.fromkeys(head["model"] for head in heads))
    for number, run in enumerate(runs):
        model = models.index(run[0]["model"])
        twin = sum(head["model"] == run[0]["model"] for head in heads[:number])
        axes.plot(
            [row["density"] for row in run], [100 * row["accuracy"] for row in run],
            color=OKABE_ITO[model % len(OKABE_ITO)],
            linestyle=LINES[model // len(OKABE_ITO) % len(LINES)],
            marker=POINTS[(model + twin) % len(POINTS)], markersize=5, linewidth=1.3,
            label=_name(run[0], heads),
        )  # fmt: skip


def _name(head: dict[str, Any], heads: list[dict[str, Any]]) -> str:
    """Name the model of a run, and what tells it from the others: data, label, seed."""
    told = [key for key in ("data", "label") if len({each[key] for each in heads}) > 1]
    seeds = {each["seed"] for each in heads if each["model"] == head["model"]}
    seed = [f"seed {head['seed']}"] if len(seeds) > 1 else []
    return ", ".join([head["model"], *(head[key] for key in told), *seed])


def _draw_many(axes: Any, runs: list[list[dict[str, Any]]]) -> None:
    """Grey lines, median and quartiles, the latter as far as half of the runs reach."""
    grid = np.linspace(np.log(min(run[-1]["density"] for run in runs)), 0, 101)
    table = np.full((len(runs), len(grid)), np.nan)
    for number, run in enumerate(runs):
        density = np.log([row["density"] for row in reversed(run)])
        accuracy = np.array([100 * row["accuracy"] for row in reversed(run)])
        reached = grid >= density[0] - 1e-3
        table[number, reached] = np.interp(grid[reached], density, accuracy)
        label = "" if number else f"one of {len(runs)} runs"
        axes.plot(np.exp(density), accuracy, color="#999999", alpha=0.4, lw=0.6, label=label)
    common = np.isfinite(table).mean(0) >= 0.5
    low, middle, high = np.nanquantile(table[:, common], [0.25, 0.5, 0.75], axis=0)
    places, blue = np.exp(grid[common]), OKABE_ITO[0]
    axes.fill_between(places, low, high, fc=blue, alpha=0.4, zorder=3, label="middle half")
    axes.plot(places, middle, color=blue, linewidth=2.2, zorder=4, label="median")


def _bins(run: IRPRun, tensors: dict[str, Tensor], name: str) -> Tensor:
    """Return the bin of each value's rank by size, 0 to BINS - 1; equal ones share a mean rank."""
    values = tensors.get(name)
    if values is None or values.shape != run.survival[name].shape or not masks.is_finite(values):
        raise UsageError(f"run {run.card['run_id']}: {name} has no finite gradient of its shape")
    _, place, count = (
        values.detach().cpu().flatten().abs().unique(return_inverse=True, return_counts=True)
    )
    return ((2 * count.cumsum(0) - count) * BINS // (2 * values.numel()))[place]
