"""Draws every figure that applies to a folder or file, from what is in it alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from autosparse.autos.network import AutoS
from autosparse.core.errors import UsageError
from autosparse.core.files import place, read_card, read_json
from autosparse.corpus.store import is_finished
from autosparse.report import corpus as corpus_report
from autosparse.report.autos_figures import calibration, surface
from autosparse.report.style import DENSE
from autosparse.report.sweep_figures import (
    accuracy_against_density,
    accuracy_against_flops,
    cost_against_density,
    layer_densities,
)
from autosparse.report.twin_figures import comparison
from autosparse.sparsity.ticket import Ticket
from autosparse.study import table
from autosparse.study.config import StudyConfig, SweepConfig
from autosparse.study.labels import TICKET
from autosparse.study.trainings import TRAINED

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
    if (where / STUDY / StudyConfig.report).is_file():
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
        report[part] = [{"contest": each["model"], **each} for each in report[part]]
    return {"stopped": [], "failed": {}, **report}


def _study(folder: Path) -> list[Path]:
    report = report_of(folder)
    out, data = folder / FIGURES, report["config"]["data"]["name"]
    best = table.best(report["rows"])
    models = {row["contest"]: row["model"] for row in best}
    figures = []
    for contest, model in models.items():
        rows = [row for row in best if row["contest"] == contest]
        prefix, title = f"{model}-" if len(models) > 1 else "", f"{model} on {data}"
        if list(models.values()).count(model) > 1:
            prefix, settings = f"{model}-{contest}-", rows[0]["training"]
            title += f": {settings}" if settings else ""
        if any(row["twins"] for row in rows):
            twins = out / f"{prefix}twins.png"
            if (folder / StudyConfig.report).is_file():
                twins = folder / f"{prefix}comparison.png"
            figures.append(comparison(rows, twins, title))
        if any(row["label"] != DENSE for row in rows):
            figures.append(accuracy_against_density(rows, out / f"{prefix}accuracy.png", title))
            figures.append(cost_against_density(rows, out / f"{prefix}cost.png", title))
            tickets = list(_with_layers(folder, rows, report["results"]))
            if tickets:
                figures.append(layer_densities(tickets, out / f"{prefix}layers.png", title))
        every = [row for row in report["rows"] if row["contest"] == contest]
        if len({row["training"] for row in every if row.get("training_flops")}) > 1:
            figures.append(accuracy_against_flops(every, out / f"{prefix}flops.png", title))
    return figures


def _with_layers(
    folder: Path, rows: list[dict[str, Any]], results: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the results that are in rows of tickets and whose file is there, with `layers`."""
    keys = ("contest", "label", "sparsity", "training")
    drawn = {tuple(row[key] for key in keys) for row in rows if row["label"] != DENSE}
    for result in results:
        path = folder / "cells" / result["cell"] / TRAINED
        wanted = result["twin"] == TICKET and tuple(result[key] for key in keys) in drawn
        if wanted and path.is_file():
            layers = {row["layer"]: row["density"] for row in Ticket.load(path).table()}
            yield {**result, "layers": layers}


def _quickstart(folder: Path) -> list[Path]:
    figures = [quickstart_figure(folder), *_study(folder / STUDY)]
    if (folder / "autos.safetensors").is_file():
        figures += draw_autos(folder / "autos.safetensors", folder / FIGURES)
    if _has_runs(folder / "corpus"):
        figures += corpus_report.write_report(folder / "corpus")
    return figures


def quickstart_figure(folder: Path) -> Path:
    """Draw what a quickstart's study reached."""
    rows = report_of(folder / STUDY)["rows"]
    return accuracy_against_density(rows, folder / "accuracy.png", f"{rows[0]['model']} on digits")


def draw_autos(path: Path, out: Path) -> list[Path]:
    """Draw an AutoS file's surface, and the calibration that its card holds."""
    network = AutoS.load(path)
    figures = [surface(network, out / f"{path.stem}-surface.png")]
    rows = network.card.get("calibration")
    if rows:
        title = f"AutoS {network.fingerprint[:8]}: calibration on its card"
        figures.append(calibration(rows, out / f"{path.stem}-calibration.png", title))
    return figures


_DRAWERS: dict[str, Callable[[Path], list[Path]]] = {
    STUDY: _study,
    QUICKSTART: _quickstart,
    CORPUS: lambda path: corpus_report.write_report(path),
    AUTOS: lambda path: draw_autos(path, path.parent / FIGURES),
}
