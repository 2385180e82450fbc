"""All figures that apply to what a folder or file holds, drawn again from it alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from autosparse.autos.network import AutoS
from autosparse.core.errors import UsageError
from autosparse.core.files import is_local, place, read_card, read_json
from autosparse.corpus.store import Corpus, is_finished
from autosparse.report import corpus as corpus_report
from autosparse.report.autos_figures import calibration, odds_calibration, predictions, surface
from autosparse.report.figures import accuracy_against_sparsity, comparison
from autosparse.report.sweep_figures import (
    accuracy_against_density,
    cost_against_density,
    layer_densities,
)
from autosparse.sparsity.ticket import Ticket
from autosparse.study import results, sweep
from autosparse.study.trainings import RESULT, TRAINED

logger = logging.getLogger(__name__)

FIGURES = "figures"
COMPARISON = "comparison.json"
SWEEP, COMPARE, QUICKSTART, CORPUS, AUTOS = "sweep", "compare", "quickstart", "corpus", "autos"


def kind_of(path: str | Path) -> str:
    """Return what a folder or file holds; raise UsageError when it is nothing to draw."""
    where = place(path)
    if where.is_file():
        if read_card(where).get("kind") == "autos":
            return AUTOS
        raise UsageError(f"{path} is no AutoS file; give that, or a folder")
    if not where.is_dir():
        raise UsageError(f"no such file or folder: {path}")
    for file, kind in ((sweep.REPORT, SWEEP), (COMPARISON, COMPARE)):
        if (where / file).is_file():
            return kind
    if (where / "trained").is_dir():
        return QUICKSTART
    if _has_runs(where):
        return CORPUS
    raise UsageError(f"{path} holds no finished sweep, comparison, quickstart or corpus")


def _has_runs(folder: Path) -> bool:
    return folder.is_dir() and any(is_finished(each) for each in folder.iterdir() if each.is_dir())


def draw(path: str | Path) -> list[Path]:
    """Draw every figure that applies; return the PNGs, each with its data in a CSV beside it."""
    return _DRAWERS[kind_of(path)](place(path))


def _sweep(folder: Path) -> list[Path]:
    report = read_json(folder / sweep.REPORT)
    out, data = folder / FIGURES, report["config"]["data"]["name"]
    best = sweep.best(report["rows"])
    names = list(dict.fromkeys(row["model"] for row in best))
    figures = []
    for model in names:
        rows = [row for row in best if row["model"] == model]
        prefix = f"{model}-" if len(names) > 1 else ""
        kept = {(row["label"], row["sparsity"], row["training"]) for row in rows}
        found = [
            each for each in report["results"]
            if each["model"] == model and each["twin"] == "ticket"
            and (each["label"], each["sparsity"], each["training"]) in kept
        ]  # fmt: skip
        figures += _of_cells(folder, rows, found, out, prefix, f"{model} on {data}")
        if any(row["twins"] for row in rows):
            figures.append(comparison(rows, out / f"{prefix}twins.png", f"{model} on {data}"))
    return figures + _of_options(report["config"], folder, out)


def _compare(folder: Path) -> list[Path]:
    report = read_json(folder / COMPARISON)
    config, rows = report["config"], report["rows"]
    title = f"{config['model']['name']} on {config['data']['name']}"
    figures = [comparison(rows, folder / "comparison.png", title)]
    found = [each for each in report["results"] if each["twin"] == "ticket"]
    figures += _of_cells(folder, rows, found, folder / FIGURES, "", title)
    return figures + _of_options(config, folder, folder / FIGURES)


def _of_cells(
    folder: Path,
    rows: list[dict[str, Any]],
    found: list[dict[str, Any]],
    out: Path,
    prefix: str,
    title: str,
) -> list[Path]:
    """Draw what sweeps, comparisons and quickstart have in common."""
    if all(row["label"] == "dense" for row in rows):
        return []
    figures = [accuracy_against_density(rows, out / f"{prefix}accuracy.png", title)]
    figures.append(cost_against_density(rows, out / f"{prefix}cost.png", title))
    tickets = [
        {"label": each["label"], "sparsity": each["sparsity"], "seed": each["seed"],
         "layers": densities}
        for each in found if each["label"] != "dense"
        if (densities := _layers(folder / "cells" / each["cell"] / TRAINED))
    ]  # fmt: skip
    if tickets:
        figures.append(layer_densities(tickets, out / f"{prefix}layers.png", title))
    return figures


def _layers(path: Path) -> dict[str, float]:
    """Return a ticket's density per layer; nothing where its file is gone."""
    if not path.is_file():
        return {}
    return {row["layer"]: row["density"] for row in Ticket.load(path).table()}


def _of_options(config: dict[str, Any], folder: Path, out: Path) -> list[Path]:
    """Draw the AutoS file that a criterion's options name, if it is there."""
    files = {
        Path(options["scorer"])
        for options in config["options"].values()
        if isinstance(options, dict) and "scorer" in options
    }
    figures = []
    for file in sorted(files):
        if file.is_file():
            figures.append(surface(AutoS.load(file), out / f"{file.stem}-surface.png"))
    return figures


def _quickstart(folder: Path) -> list[Path]:
    found = [
        {**read_json(path), "cell": path.parent.name}
        for path in sorted((folder / "trained").glob(f"*/{RESULT}"))
    ]
    if not found:
        raise UsageError(f"{folder} holds no trained ticket yet")
    summary = results.summary(found)
    title = f"{summary[0]['model']} on digits"
    seeds = max(row["seeds"] for row in summary)
    named = f"{title}, mean ± standard deviation of {seeds} seeds"
    figures = [accuracy_against_sparsity(summary, folder / "accuracy.png", named)]
    rows = [
        {**row, "label": row["criterion"], "step_seconds": _step_seconds(folder, row, found)}
        for row in summary
    ]
    out = folder / FIGURES
    figures.append(accuracy_against_density(rows, out / "accuracy.png", title))
    figures.append(cost_against_density(rows, out / "cost.png", title))
    tickets = [
        {"label": each["criterion"], "sparsity": each["sparsity"], "seed": each["seed"],
         "layers": _layers(folder / "trained" / each["cell"] / TRAINED)}
        for each in found if each["criterion"] != "dense"
    ]  # fmt: skip
    figures.append(layer_densities(tickets, out / "layers.png", title))
    if (folder / "autos.safetensors").is_file():
        figures += draw_autos(folder / "autos.safetensors", folder / "corpus", out)
    if _has_runs(folder / "corpus"):
        figures += corpus_report.write_report(folder / "corpus")
    return figures


def _step_seconds(folder: Path, row: dict[str, Any], found: list[dict[str, Any]]) -> float:
    """Return seconds per step of a summary's row; the batch size is on the trained ticket."""
    mine = next(
        each for each in found
        if (each["criterion"], each["sparsity"]) == (row["criterion"], row["sparsity"])
    )  # fmt: skip
    card = read_card(folder / "trained" / mine["cell"] / TRAINED)["card"]
    return row["seconds"] * card["training"]["batch_size"] / max(mine["training_passes"], 1)


def _autos(path: Path) -> list[Path]:
    return draw_autos(path, None, path.parent / FIGURES)


def draw_autos(path: Path, corpus: Path | None, out: Path) -> list[Path]:
    """Draw an AutoS file's surface, and its calibration where its corpus is there."""
    network = AutoS.load(path)
    figures = [surface(network, out / f"{path.stem}-surface.png")]
    if network.head == "survival":
        rows = network.card.get("calibration")
        title = f"AutoS {network.fingerprint[:8]}: calibration on its card"
        target = out / f"{path.stem}-calibration.png"
        return [*figures, odds_calibration(rows, target, title)] if rows else figures
    if corpus is None:
        return figures
    try:
        groups = predictions(network, Corpus(corpus))
    except UsageError as error:
        logger.warning("the calibration is left out: %s", error)
        return figures
    title = f"AutoS {network.fingerprint[:8]} on runs it has not seen"
    return [*figures, calibration(groups, out / f"{path.stem}-calibration.png", title)]


_DRAWERS: dict[str, Callable[[Path], list[Path]]] = {
    SWEEP: _sweep,
    COMPARE: _compare,
    QUICKSTART: _quickstart,
    CORPUS: lambda path: corpus_report.write_report(path),
    AUTOS: _autos,
}


def drawn(path: str | Path) -> Iterator[Path]:
    """Yield the figures that a folder holds already."""
    folder = place(path)
    if is_local(folder):
        for pattern in ("*.png", f"{FIGURES}/*.png", "report/*.png"):
            yield from sorted(folder.glob(pattern))
