"""A study in MLflow: one run for the study, one nested in it for every cell, each found again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param

from autosparse.core.config import plain, run_id
from autosparse.core.files import read_card, read_json
from autosparse.data import sets
from autosparse.data.config import DataConfig
from autosparse.data.sets import DataSource
from autosparse.integrations.mlflow import (
    RUN_FILE,
    client,
    flattened,
    log_data,
    log_report,
    parent_run,
)
from autosparse.study import axes, table
from autosparse.study.config import StudyConfig
from autosparse.study.grid import StudyCell
from autosparse.study.labels import criterion_of
from autosparse.study.trainings import RESULT, TRAINED

CELL = "cell"
"""Tag that names the cell of a run."""
FINAL = ("test_accuracy", "test_loss", "validation_accuracy", "parameters", "kept",
         "checkpoint_bytes", "seconds", "image_passes")  # fmt: skip


class StudyTracker:
    """Logs cells; what MLflow holds already is looked up, so nothing is logged twice."""

    def __init__(self, parent: str, config: StudyConfig, folder: Path) -> None:
        self.parent, self.config = parent, config
        self.client, self.experiment = client(folder)
        self.runs: dict[str, str] = {}
        self.ended: set[str] = set()
        self.logged: dict[str, set[int]] = {}
        self.sources: dict[str, DataSource] = {}
        self._find()

    def _find(self) -> None:
        """Look up the runs of this study."""
        wanted, token = f"tags.`mlflow.parentRunId` = '{self.parent}'", None
        while True:
            page = self.client.search_runs([self.experiment], wanted, page_token=token)
            for run in page:
                self.runs.setdefault(run.data.tags.get(CELL, run.info.run_id), run.info.run_id)
                if run.info.status == "FINISHED":
                    self.ended.add(run.data.tags.get(CELL, ""))
            token = page.token
            if not token:
                return

    def catch_up(self, cells: Sequence[StudyCell]) -> None:
        """Log cells that were over before, as far as MLflow does not know of it."""
        for cell in cells:
            self._know(cell)
            if cell.key not in self.ended:
                self.end(cell)

    def _know(self, cell: StudyCell) -> None:
        """Give the run of an earlier version, which the cell's folder names, the cell's tag."""
        file = cell.folder / RUN_FILE
        run = read_json(file).get("run_id") if file.is_file() else None
        if run in self.runs:
            self.client.set_tag(run, CELL, cell.key)
            self.runs[cell.key] = self.runs.pop(run)
            if self.client.get_run(run).info.status == "FINISHED":
                self.ended.add(cell.key)

    def epochs(self, cell: StudyCell, entries: Sequence[dict[str, Any]]) -> None:
        """Log epochs that are new."""
        run = self._run(cell)
        if cell.key not in self.logged:
            before = self.client.get_metric_history(run, "train_loss")
            self.logged[cell.key] = {metric.step for metric in before}
        new = [entry for entry in entries if entry["epoch"] not in self.logged[cell.key]]
        now = int(time.time() * 1000)
        metrics = [
            Metric(name, float(value), now, entry["epoch"])
            for entry in new
            for name, value in entry.items()
            if name != "epoch"
        ]
        if metrics:
            self.client.log_batch(run, metrics=metrics)
        self.logged[cell.key] |= {entry["epoch"] for entry in new}

    def end(self, cell: StudyCell) -> None:
        """Close the run of a cell that is over, or has failed."""
        run = self._run(cell)
        if cell.state == "failed":
            self.client.set_tag(run, "error", cell.error()[:5000])
            self.client.set_terminated(run, "FAILED")
            return
        self.epochs(cell, cell.history())
        self.client.set_tag(run, "state", cell.state)
        if cell.state == "finished":
            result = cell.result()
            now = int(time.time() * 1000)
            metrics = [Metric(f"final/{name}", float(result[name]), now, 0) for name in FINAL]
            self.client.log_batch(run, metrics=metrics)
            for key, value in _lineage(cell).items():
                self.client.set_tag(run, key, value)
            for name in (RESULT, TRAINED):
                self.client.log_artifact(run, str(cell.folder / name))
        self.client.set_terminated(run)
        self.ended.add(cell.key)

    def _run(self, cell: StudyCell) -> str:
        """Return the run of a cell; made if need be, opened again if it had failed."""
        if cell.key in self.runs:
            if cell.key not in self.logged:
                self.client.update_run(self.runs[cell.key], status="RUNNING")
            return self.runs[cell.key]
        settings = cell.config
        tags = {
            "mlflow.parentRunId": self.parent, CELL: cell.key, "model": settings.model.name,
            "criterion": cell.label, "twin": cell.twin, "sparsity": f"{cell.sparsity:g}",
            "seed": str(cell.seed), "training": axes.shown(cell.point) or "-",
        }  # fmt: skip
        name = f"{settings.model.name} {cell.name}" if len(self.config.models) > 1 else cell.name
        made = self.client.create_run(self.experiment, tags=tags, run_name=name).info.run_id
        self.runs[cell.key] = made
        settled = {"model": plain(settings.model), "data": plain(settings.data),
                 "training": plain(settings.training), "seed": cell.seed}  # fmt: skip
        _, options = criterion_of(settings, cell.label)
        parameters = {**flattened(settled), **flattened({"options": options})}
        self.client.log_batch(made, params=[Param(key, value) for key, value in parameters.items()])
        log_data(self.client, made, self.source(settings.data))
        return made

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
def study_tracker(config: StudyConfig, folder: Path) -> Iterator[StudyTracker]:
    """Open the study's run, the same one every time, and give a tracker of its cells."""
    kind = config.report.removesuffix(".json")
    with parent_run(f"{kind} {folder.name}", folder) as parent:
        tracker = StudyTracker(parent, config, folder)
        log_data(tracker.client, parent, tracker.source(config.data))
        yield tracker


def log_study(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Log the table, figures and page of a study to its run, and say there what is best.

    `path` is the study's report, e.g. sweep.json.
    """
    folder = path.parent
    server, experiment = client(folder)
    run = read_json(folder / RUN_FILE)["run_id"]
    figures = sorted((folder / "figures").glob("*.png"))
    log_report(run, list(table.shown(rows)), figures)
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
        wanted = f"tags.cell = '{best['cell']}' and tags.`mlflow.parentRunId` = '{run}'"
        runs = server.search_runs([experiment], wanted, max_results=1)
        link = f"[{best['name']}]({where}/{runs[0].info.run_id})" if runs else best["name"]
        lines.append(
            f"| {best['model']} | {100 * best['sparsity']:g} % | {best['label']} | {best['seed']} | "
            f"{100 * best['test_accuracy']:.1f} % | {link} |"
        )
    lines += ["", f"All of it on one page: [report.html]({where}/{run}/artifacts/report.html), "
              f"[accuracy.png]({where}/{run}/artifacts/figures/accuracy.png)"]  # fmt: skip
    return "\n".join(lines)
