"""Pictures of AutoS: the surface it has learned, and how well its predictions hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autosparse.autos.config import FitConfig
from autosparse.autos.fit import Rows, sample_rows
from autosparse.autos.heads import interpolation
from autosparse.autos.network import AutoS
from autosparse.core.errors import UsageError
from autosparse.corpus.store import Corpus
from autosparse.report.style import (
    COLOURS,
    COLUMN,
    MARKERS,
    OKABE_ITO,
    criterion_of,
    labels_beside,
    panels,
    save,
)

STEPS, GROUPS = 41, 20
REACH = 3.0
"""How far the axes reach: in standard deviations, or in multiples of the layer's rms."""
AT = 0.05
"""The density at which the surface of a survival head is shown."""
FEWEST = 1e-4
"""Costs below this share of a training are drawn at it: a log axis has no zero."""


def surface(network: AutoS, path: Path) -> Path:
    """Draw what AutoS says over initial weight and gradient, the other inputs at their mean.

    Predicted survival; of a survival head, the log-odds inside a layer at density AT.

    Args:
        network: a fitted AutoS. One that reads `paper` features gets one panel; `context` two,
            as the product of weight and gradient has a sign (below zero: the first step makes
            the weight larger).
        path: the PNG to write; the data go to the CSV beside it.
    """
    context = network.kind == "context"
    signs = (-1.0, 1.0) if context else (1.0,)
    values = [_surface(network, sign) for sign in signs]
    low = min(float(each[2].min()) for each in values)
    high = max(float(each[2].max()) for each in values)
    names = {-1.0: "weight · gradient < 0", 1.0: "weight · gradient > 0"}
    size = (7.2, 3.7) if context else (4.9, 3.9)
    with panels(size, columns=len(signs), sharey=True) as (figure, grid):
        for axes, sign, (x, y, z) in zip(grid[0], signs, values, strict=True):
            mesh = axes.contourf(x, y, z.T, 20, vmin=low, vmax=high, cmap="viridis")
            axes.grid(False)
            axes.set_xlabel("|initial weight| / rms of its layer" if context else "initial weight")
            if context:
                axes.set_title(names[sign], fontsize=11)
        grid[0, 0].set_ylabel("|gradient| / rms of its layer" if context else "gradient at init")
        mesh.set_clim(low, high)
        label = (
            f"log-odds at density {AT:g}" if network.head == "survival" else "predicted survival"
        )
        figure.colorbar(mesh, ax=list(grid[0]), label=label)
        runs = len(network.card.get("trained_on", []))
        figure.suptitle(f"AutoS {network.fingerprint[:8]}, fitted on {runs} IRP runs", fontsize=11)
        rows = [
            {"sign_of_product": sign, "weight": float(a), "gradient": float(b),
             "predicted_survival": float(z[i, j])}
            for sign, (x, y, z) in zip(signs, values, strict=True)
            for i, a in enumerate(x) for j, b in enumerate(y)
        ]  # fmt: skip
        return save(figure, rows, path)


@torch.no_grad()
def _surface(network: AutoS, sign: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights [STEPS], gradients [STEPS] and predictions [STEPS, STEPS]."""
    scale = network.heads if network.head == "survival" else network
    if network.kind == "context":
        x = y = torch.linspace(0, REACH, STEPS)
    else:
        spread = REACH * scale.std
        x = scale.mean[0] + torch.linspace(-1, 1, STEPS) * spread[0]
        y = scale.mean[1] + torch.linspace(-1, 1, STEPS) * spread[1]
    weights, gradients = torch.meshgrid(x, y, indexing="ij")
    inputs = scale.mean.repeat(STEPS * STEPS, 1)
    inputs[:, 0] = weights.flatten()
    inputs[:, 1] = gradients.flatten()
    if network.kind == "context":
        inputs[:, 1] = gradients.flatten().asinh()
        inputs[:, 2] = (sign * weights * gradients).flatten().asinh()
    if network.head == "survival":
        mix = torch.tensor(interpolation(AT, network.densities))
        return x, y, (network.heads.weights_say(inputs) @ mix).view(STEPS, STEPS)
    return x, y, network.eval()(inputs).view(STEPS, STEPS)


def calibration(groups: Iterable[tuple[str, Tensor, Tensor]], path: Path, title: str) -> Path:
    """Draw mean true survival against mean predicted survival, a line per group of weights.

    Args:
        groups: (name, predicted [N], true [N]); each is cut into GROUPS parts of equal size by
            prediction.
        path: the PNG to write; the data go to the CSV beside it.
        title: which AutoS this is.
    """
    rows = [row for name, guess, truth in groups for row in _calibration(name, guess, truth)]
    if not rows:
        raise UsageError("no weights to draw the calibration of")
    with panels(COLUMN) as (figure, grid):
        axes = grid[0, 0]
        ends = [
            min(min(row["predicted"], row["true"]) for row in rows),
            max(max(row["predicted"], row["true"]) for row in rows),
        ]
        axes.plot(ends, ends, color="#444444", linestyle="--", linewidth=1.2, label="exact")
        names = list(dict.fromkeys(row["group"] for row in rows))
        for place, name in enumerate(names):
            mine = [row for row in rows if row["group"] == name]
            predicted, true = ([row[key] for row in mine] for key in ("predicted", "true"))
            low, high = ([row[key] for row in mine] for key in ("quarter", "three_quarters"))
            colour = OKABE_ITO[place % len(OKABE_ITO)]
            axes.fill_between(predicted, low, high, color=colour, alpha=0.12, linewidth=0)
            axes.plot(predicted, true, color=colour, marker="osD^vX"[place % 6], markersize=5,
                      label=name)  # fmt: skip
        axes.set_xlabel("predicted survival")
        axes.set_ylabel("true survival: mean, middle half")
        axes.set_title(title, loc="left", fontsize=11)
        figure.legend(loc="outside lower center", ncols=3, fontsize=9)
        return save(figure, rows, path)


def _calibration(name: str, guess: Tensor, truth: Tensor) -> list[dict[str, Any]]:
    order = guess.argsort()
    rows = []
    for part in order.tensor_split(min(GROUPS, len(order))):
        low, high = truth[part].quantile(torch.tensor([0.25, 0.75])).tolist()
        rows.append({
            "group": name, "weights": len(part), "predicted": float(guess[part].mean()),
            "true": float(truth[part].mean()), "quarter": low, "three_quarters": high,
        })  # fmt: skip
    return rows


def predictions(network: AutoS, corpus: Corpus) -> list[tuple[str, Tensor, Tensor]]:
    """Return (group, predicted, true) of weights of the runs that fitting held out, by model.

    Raises UsageError when the corpus is not the one that the network was fitted on.
    """
    card = network.card
    there = {folder.name for folder in corpus.folders()}
    missing = [name for name in card.get("held_out", []) if name not in there]
    if missing or "held_out" not in card:
        raise UsageError(
            f"{corpus.path} is not the corpus that this AutoS was fitted on: run "
            f"{missing[0] if missing else '?'} is not there"
        )
    settings = FitConfig(features=network.kind, rows_per_run=card["config"]["rows_per_run"])
    found: dict[str, list[Rows]] = {}
    for name in card["held_out"]:
        run = corpus.read(name)
        found.setdefault(run.card["config"]["model"]["name"], []).append(
            sample_rows(run, settings, name)
        )
    groups = []
    for model, parts in found.items():
        rows = Rows.join(parts)
        with torch.no_grad():
            guess = torch.cat([network(part) for part in rows.inputs.split(1 << 16)])
        groups.append((f"{model}, held out", guess, rows.targets))
    return groups


def odds_calibration(rows: Sequence[dict[str, Any]], path: Path, title: str) -> Path:
    """Draw the share of weights alive against the predicted probability, both as log-odds.

    Args:
        rows: `predicted`, `alive` and `weights` per bin, as on an AutoS file's card.
        path: the PNG to write; the data go to the CSV beside it.
        title: what was predicted for whom.
    """
    with panels((5.4, 4.6)) as (figure, grid):
        axes = grid[0, 0]
        ends = [1e-4, 1 - 1e-4]
        axes.plot(ends, ends, color="#444444", linestyle="--", label="exact")
        x, y = (
            [min(max(row[key], 1e-4), 1 - 1e-4) for row in rows] for key in ("predicted", "alive")
        )
        axes.plot(x, y, color=COLOURS["autos"], marker="o", label="AutoS")
        axes.set_xscale("logit")
        axes.set_yscale("logit")
        axes.minorticks_off()
        ticks = [0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999]
        axes.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
        axes.set_yticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
        axes.set_xlabel("predicted probability that a weight is alive")
        axes.set_ylabel("share of weights alive")
        axes.set_title(title, loc="left", fontsize=11)
        beside = {"xytext": (8, -12), "textcoords": "offset points"}
        axes.annotate("exact", (0.999, 0.999), color="#444444", **beside)
        axes.annotate("AutoS", (x[-1], y[-1]), color=COLOURS["autos"], **beside)
        return save(figure, rows, path)


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
