"""Studies and corpora in MLflow: a run for each, with one nested in it per cell or IRP run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from autosparse.core.config import plain, run_id
from autosparse.core.files import read_card, read_json
from autosparse.data import sets
from autosparse.data.config import DataConfig
from autosparse.data.sets import DataSource
from autosparse.integrations.mlflow import (
    CELL,
    NestedRuns,
    client,
    log_data,
    log_result,
    nested_run,
    parent_run,
    run_of,
    tried,
)
from autosparse.irp.config import IRPConfig
from autosparse.study import table
from autosparse.study.config import StudyConfig
from autosparse.study.grid import StudyCell
from autosparse.study.labels import criterion_of
from autosparse.study.trainings import TRAINED

LEVEL = ("level", "validation_accuracy", "density", "seconds", "train_loss")
"""What is logged of a level of IRP."""


def sent(method: Callable[..., None]) -> Callable[..., None]:
    """Make a tracker's method do nothing once MLflow is away; see `tried`."""

    @wraps(method)
    def told(self: Any, *arguments: Any) -> None:
        tried(self.folder, lambda: method(self, *arguments))

    return told


class CorpusTracker:
    """Logs IRP runs: one that was begun before goes on in its own run."""

    def __init__(self, parent: str, configs: Mapping[str, IRPConfig], folder: Path) -> None:
        self.configs, self.folder = configs, folder
        self.nested = NestedRuns(parent, "run_id", "level", folder)

    @sent
    def levels(self, name: str, entries: Sequence[dict[str, Any]]) -> None:
        """Log levels: accuracy, density and seconds, the level as the step."""
        self._open(name)
        self.nested.log(name, [{key: entry[key] for key in LEVEL} for entry in entries])

    @sent
    def end(self, name: str, error: str | None) -> None:
        """Close a run; `error` says why it failed."""
        self._open(name)
        self.nested.close(name, error)

    def _open(self, name: str) -> None:
        config = self.configs[name]
        tags = {"model": config.model.name, "data": config.data.name, "label": config.label}
        settings = {**plain(config), "out": "", "device": config.device}
        self.nested.opened(name, f"{config.model.name} seed {config.seed}", tags, settings)


class StudyTracker:
    """Logs the cells of a study; what MLflow holds already is looked up, and not logged again."""

    def __init__(self, parent: str, folder: Path) -> None:
        self.folder, self.nested = folder, NestedRuns(parent, CELL, "epoch", folder)
        self.client = self.nested.client
        self.sources: dict[str, DataSource] = {}

    @sent
    def catch_up(self, cells: Sequence[StudyCell]) -> None:
        """Log cells that were over before, as far as MLflow does not know of it."""
        for cell in cells:
            if cell.key not in self.nested.finished:
                self.end(cell)

    @sent
    def epochs(self, cell: StudyCell, entries: Sequence[dict[str, Any]]) -> None:
        """Log epochs that are new."""
        self._open(cell)
        self.nested.log(cell.key, entries)

    @sent
    def end(self, cell: StudyCell) -> None:
        """Close the run of a cell that is over, or has failed."""
        run = self._open(cell)
        if cell.state == "failed":
            self.nested.close(cell.key, cell.error())
            return
        self.nested.log(cell.key, cell.history())
        self.client.set_tag(run, "state", cell.state)
        if cell.state == "finished":
            log_result(self.client, run, cell.folder, cell.result())
            for key, value in _lineage(cell).items():
                self.client.set_tag(run, key, value)
        self.nested.close(cell.key)

    def _open(self, cell: StudyCell) -> str:
        """Return the run of a cell; made if need be, opened again if it had failed."""
        config, new = cell.config, cell.key not in self.nested.runs
        tags = {
            "model": config.model.name, "criterion": cell.label, "twin": cell.twin,
            "sparsity": f"{cell.sparsity:g}", "seed": str(cell.seed),
            "training": cell.place["training"] or "-",
        }  # fmt: skip
        settings = {
            "model": plain(config.model), "data": plain(config.data), "seed": cell.seed,
            "training": plain(config.training), "options": criterion_of(config, cell.label)[1],
        }  # fmt: skip
        title = f"{config.model.name} {cell.name}" if len(config.models) > 1 else cell.name
        run = self.nested.opened(cell.key, title, tags, settings)
        if new:
            log_data(self.client, run, self.source(config.data))
        return run

    def source(self, data: DataConfig) -> DataSource:
        """Return data; loaded once, and here: a cell's device may be another machine's."""
        key = run_id(data)
        if key not in self.sources:
            self.sources[key] = sets.load(data)
        return self.sources[key]


def _lineage(cell: StudyCell) -> dict[str, str]:
    """Return what a finished cell's ticket came from."""
    card = read_card(cell.folder / TRAINED)
    origin = {key: card["card"][key] for key in ("autos", "corpus") if key in card["card"]}
    return {"ticket": card["fingerprint"], **origin}


@contextmanager
def study_tracker(config: StudyConfig, folder: Path) -> Iterator[StudyTracker | None]:
    """Open the study's run, the same one every time, and give a tracker of its cells.

    Gives None where MLflow cannot be reached.
    """
    kind = config.report.removesuffix(".json")

    def tracker_of(parent: str) -> StudyTracker:
        tracker = StudyTracker(parent, folder)
        log_data(tracker.client, parent, tracker.source(config.data))
        return tracker

    with parent_run(f"{kind} {folder.name}", folder, tracker_of) as tracker:
        yield tracker


@contextmanager
def corpus_tracker(
    configs: Mapping[str, IRPConfig], folder: Path
) -> Iterator[CorpusTracker | None]:
    """Open a corpus's run, the same one every time, and give a tracker of its IRP runs.

    Gives None where MLflow cannot be reached.
    """
    with parent_run(
        f"corpus {folder.name}", folder, lambda parent: CorpusTracker(parent, configs, folder)
    ) as tracker:
        yield tracker


def log_study(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Log the table, figures and page of a study to its run, and say there what is best.

    `path` is the study's report, e.g. sweep.json.
    """
    tried(path.parent, lambda: _log_study(path, rows))


def _log_study(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    folder = path.parent
    server, experiment = client(folder)
    run = run_of(server, folder)
    if run is None:
        return
    content = list(table.shown(rows))
    name = f"results-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]}.json"
    if name not in [each.path for each in server.list_artifacts(run)]:  # Else it would be longer.
        server.log_table(run, {key: [row[key] for row in content] for key in content[0]}, name)
    for figure in sorted((folder / "figures").glob("*.png")):
        server.log_artifact(run, str(figure), "figures")
    page = folder / "report.html"
    if page.is_file():
        server.log_artifact(run, str(page))
    server.set_tag(run, "mlflow.note.content", _note(server, experiment, run, read_json(path)))


def _note(server: Any, experiment: str, run: str, report: dict[str, Any]) -> str:
    """Return what the study's page says: the best ticket at each sparsity, with links."""
    where = f"#/experiments/{experiment}/runs"
    lines = ["The best ticket of each sparsity, by validation accuracy:", "",
             "| model | sparsity | criterion | seed | test accuracy | run |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for best in table.best_results(report["results"]):
        its_run = nested_run(server, experiment, run, best["cell"])
        link = f"[{best['name']}]({where}/{its_run})" if its_run else best["name"]
        lines.append(
            f"| {best['model']} | {100 * best['sparsity']:g} % | {best['label']} | "
            f"{best['seed']} | {100 * best['test_accuracy']:.1f} % | {link} |"
        )
    lines += ["", f"All of it on one page: [report.html]({where}/{run}/artifacts/report.html), "
              f"[accuracy.png]({where}/{run}/artifacts/figures/accuracy.png)"]  # fmt: skip
    return "\n".join(lines)
