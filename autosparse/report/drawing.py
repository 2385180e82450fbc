"""All figures that apply to what a folder or file holds, drawn again from it alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autosparse.autos.network import AutoS
from autosparse.core.errors import UsageError
from autosparse.core.files import place, read_card, read_json
from autosparse.corpus.store import Corpus, is_finished
from autosparse.report import corpus as corpus_report
from autosparse.report.autos_figures import calibration, odds_calibration, predictions, surface
from autosparse.report.figures import accuracy_against_sparsity, comparison
from autosparse.report.style import of_seeds
from autosparse.report.sweep_figures import (
    accuracy_against_density,
    accuracy_against_flops,
    cost_against_density,
    layer_densities,
)
from autosparse.sparsity.ticket import Ticket
from autosparse.study import table
from autosparse.study.config import StudyConfig, SweepConfig
from autosparse.study.trainings import RESULT, TRAINED

logger = logging.getLogger(__name__)

FIGURES = "figures"
STUDY, QUICKSTART, CORPUS, AUTOS = "study", "quickstart", "corpus", "autos"
REPORTS = (SweepConfig.report, StudyConfig.report)


def kind_of(path: str | Path) -> str:
    """Return what a folder or file holds; raise UsageError when it is nothing to draw."""
    where = place(path)
    if where.is_file():
        if read_card(where).get("kind") == "autos":
            return AUTOS
        raise UsageError(f"{path} is no AutoS file; give that, or a folder")
    if not where.is_dir():
        raise UsageError(f"no such file or folder: {path}")
    if any((where / file).is_file() for file in REPORTS):
        return STUDY
    if (where / "trained").is_dir() or (where / STUDY / StudyConfig.report).is_file():
        return QUICKSTART
    if _has_runs(where):
        return CORPUS
    raise UsageError(f"{path} holds no finished sweep, comparison, quickstart or corpus")


def _has_runs(folder: Path) -> bool:
    return folder.is_dir() and any(is_finished(each) for each in folder.iterdir() if each.is_dir())


def draw(path: str | Path) -> list[Path]:
    """Draw every figure that applies; return the PNGs, each with its data in a CSV beside it."""
    return _DRAWERS[kind_of(path)](place(path))


def report_of(folder: Path) -> dict[str, Any]:
    """Return a study's settings, table and results; what earlier versions left out is put in."""
    report = read_json(next(folder / file for file in REPORTS if (folder / file).is_file()))
    place = {"model": report["config"].get("model", {}).get("name"), "training": ""}
    for part in ("rows", "results"):
        report[part] = [{**place, **each} for each in report[part]]
    return {"stopped": [], "failed": {}, **report}


def _study(folder: Path) -> list[Path]:
    report = report_of(folder)
    out, data = folder / FIGURES, report["config"]["data"]["name"]
    best = table.best(report["rows"])
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
        if any(row["twins"] for row in rows):
            twins = out / f"{prefix}twins.png"
            if (folder / StudyConfig.report).is_file():
                twins = folder / f"{prefix}comparison.png"
            figures.append(comparison(rows, twins, f"{model} on {data}"))
        figures += _of_cells(folder / "cells", rows, found, out, prefix, f"{model} on {data}")
        every = [row for row in report["rows"] if row["model"] == model]
        if len({row["training"] for row in every if row.get("training_flops")}) > 1:
            path = out / f"{prefix}flops.png"
            figures.append(accuracy_against_flops(every, path, f"{model} on {data}"))
    return figures + _of_options(report["config"], out)


def _of_cells(
    folder: Path,
    rows: list[dict[str, Any]],
    found: list[dict[str, Any]],
    out: Path,
    prefix: str,
    title: str,
) -> list[Path]:
    """Draw what studies and quickstart have in common; `folder` holds the cells' folders."""
    if all(row["label"] == "dense" for row in rows):
        return []
    figures = [accuracy_against_density(rows, out / f"{prefix}accuracy.png", title)]
    figures.append(cost_against_density(rows, out / f"{prefix}cost.png", title))
    tickets = [
        {"label": each["label"], "sparsity": each["sparsity"], "seed": each["seed"],
         "layers": densities}
        for each in found if each["label"] != "dense"
        if (densities := _layers(folder / each["cell"] / TRAINED))
    ]  # fmt: skip
    if tickets:
        figures.append(layer_densities(tickets, out / f"{prefix}layers.png", title))
    return figures


def _layers(path: Path) -> dict[str, float]:
    """Return a ticket's density per layer; nothing where its file is gone."""
    if not path.is_file():
        return {}
    return {row["layer"]: row["density"] for row in Ticket.load(path).table()}


def _of_options(config: dict[str, Any], out: Path) -> list[Path]:
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
    out = folder / FIGURES
    if (folder / STUDY).is_dir():
        figures = [quickstart_figure(folder), *_study(folder / STUDY)]
    else:
        figures = _trained_tickets(folder, out)
    if (folder / "autos.safetensors").is_file():
        figures += draw_autos(folder / "autos.safetensors", folder / "corpus", out)
    if _has_runs(folder / "corpus"):
        figures += corpus_report.write_report(folder / "corpus")
    return figures


def quickstart_figure(folder: Path) -> Path:
    """Draw what a quickstart's study reached."""
    rows = report_of(folder / STUDY)["rows"]
    seeds = max(row["seeds"] for row in rows)
    title = f"{rows[0]['model']} on digits, {of_seeds(seeds)}"
    return accuracy_against_sparsity(rows, folder / "accuracy.png", title)


def _trained_tickets(folder: Path, out: Path) -> list[Path]:
    """Draw what a quickstart of an earlier version trained, ticket file by ticket file."""
    trained = folder / "trained"
    found = []
    for path in sorted(trained.glob(f"*/{RESULT}")):
        card = read_card(path.with_name(TRAINED))["card"]
        place = table.placed(read_json(path), card["training"]["batch_size"])
        found.append({**place, "cell": path.parent.name})
    if not found:
        raise UsageError(f"{folder} holds no trained ticket yet")
    rows = table.rows(found)
    title = f"{rows[0]['model']} on digits"
    figures = [accuracy_against_sparsity(rows, folder / "accuracy.png", title)]
    return figures + _of_cells(trained, rows, found, out, "", title)


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
    STUDY: _study,
    QUICKSTART: _quickstart,
    CORPUS: lambda path: corpus_report.write_report(path),
    AUTOS: _autos,
}
