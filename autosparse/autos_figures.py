"""Pictures of AutoS: how calibrated it is, and what a ticket costs against what it is worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autosparse.figures import COLOURS, STYLE, save

FEWEST = 1e-4
"""Costs below this share of a training are drawn there: a logarithm has no zero."""


def calibration(rows: Sequence[dict[str, Any]], path: Path, title: str) -> Path:
    """Draw the share of weights alive against the predicted probability, both as log-odds.

    Args:
        rows: `predicted`, `alive` and `weights` per bin, as on an AutoS file's card.
        path: the PNG to write; the data go to the CSV beside it.
        title: what was predicted for whom.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(5.4, 4.6), layout="constrained")
        axes.plot(
            [1e-4, 1 - 1e-4], [1e-4, 1 - 1e-4], color="#444444", linestyle="--", label="exact"
        )
        axes.plot(
            [min(max(row["predicted"], 1e-4), 1 - 1e-4) for row in rows],
            [min(max(row["alive"], 1e-4), 1 - 1e-4) for row in rows],
            color=COLOURS["autos"],
            marker="o",
            label="AutoS",
        )
        axes.set_xscale("logit")
        axes.set_yscale("logit")
        axes.minorticks_off()
        ticks = [0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999]
        axes.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
        axes.set_yticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
        axes.set_xlabel("predicted probability that a weight is alive")
        axes.set_ylabel("share of weights alive")
        axes.set_title(title, loc="left", fontsize=11)
        axes.legend()
        return save(figure, rows, path)


def frontier(rows: Sequence[dict[str, Any]], path: Path, title: str) -> Path:
    """Draw accuracy against the cost of finding the ticket, a point per label.

    Args:
        rows: `label`, `accuracy`, `spread` (0 to 1) and `cost_share` (of the training).
        path: the PNG to write; the data go to the CSV beside it.
        title: what was trained on what.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
        for number, row in enumerate(sorted(rows, key=lambda each: -each["accuracy"])):
            if row["label"] == "dense":
                axes.axhline(100 * row["accuracy"], color="#444444", linestyle="--")
                continue
            ours = row["label"].startswith("autos") and row["label"] != "autos_paper"
            axes.errorbar(
                max(100 * row["cost_share"], 100 * FEWEST),
                100 * row["accuracy"],
                yerr=100 * row["spread"],
                marker="osD^vXP*"[number % 8],
                linestyle="none",
                color=COLOURS["autos"] if ours else COLOURS["magnitude"],
                markersize=8,
                capsize=3,
                label=f"{row['label']}: {100 * row['accuracy']:.1f}",
            )
        axes.set_xscale("log")
        axes.set_xlabel(f"cost of the ticket, % of its training ({100 * FEWEST:g}: none)")
        axes.set_ylabel("test accuracy, % (dashed: dense)")
        axes.set_title(title, loc="left", fontsize=11)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return save(figure, rows, path)
