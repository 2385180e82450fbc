"""Figures of AutoS: the surface it has learned, and how well its predictions hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autosparse.autos.heads import interpolation
from autosparse.autos.network import AutoS
from autosparse.report.style import COLOURS, panels, save

STEPS = 41
"""Points along each axis of the surface."""
REACH = 3.0
"""How far the axes reach: in standard deviations, or in multiples of the layer's rms."""
AT = 0.05
"""The density at which the surface of a survival head is shown."""


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


def calibration(rows: Sequence[dict[str, Any]], path: Path, title: str) -> Path:
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
