"""MLflow: runs with their config, inputs and metrics.

Tracking goes to MLFLOW_TRACKING_URI, or to `mlflow.db` (SQLite) in the current folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from autosparse.core.config import plain
from autosparse.core.files import is_local, read_json, write_json
from autosparse.criteria.pruning import DENSE
from autosparse.data import sets
from autosparse.data.sets import DataSource
from autosparse.irp.config import IRPConfig
from autosparse.study.config import SparseTrainConfig
from autosparse.study.trainings import RESULT, SETTINGS, TRAINED, Cell
from autosparse.training.steppers import Epoch

for chatty in ("mlflow", "alembic"):
    logging.getLogger(chatty).setLevel(logging.WARNING)
logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)  # Spooled warns, once.

EXPERIMENT = "autosparse"
PARENT_VARIABLE = "AUTOSPARSE_PARENT_RUN"
RUN_FILE = "mlflow.json"
KIND = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": "A run for each sweep, comparison and corpus, with its cells nested in "
    "it; the page of a sweep's run says what is best. Checkpoints to use are under Models.",
}
"""Tags: shown as an experiment of training (not of language models), with a description."""


def tracking_uri(folder: Path | None = None) -> str:
    """Return MLFLOW_TRACKING_URI, or the SQLite database in `folder` (default: the current)."""
    local = folder if folder is not None and is_local(folder) else Path.cwd()
    database = local.absolute() / "mlflow.db"
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{database}"


def client(folder: Path | None = None) -> tuple[MlflowClient, str]:
    """Return a client and the id of our experiment, which is made if need be."""
    uri = tracking_uri(folder)
    mlflow.set_tracking_uri(uri)
    server = MlflowClient()
    experiment = server.get_experiment_by_name(EXPERIMENT)
    if experiment is not None:
        for key, value in KIND.items():
            if key not in experiment.tags:
                server.set_experiment_tag(experiment.experiment_id, key, value)
        return server, experiment.experiment_id
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
    return server, server.create_experiment(EXPERIMENT, artifact_location=location, tags=KIND)


class Tracker:
    """An Observer: one MLflow run per cell, gone on with if the cell is resumed."""

    def __init__(self) -> None:
        self.runs: dict[Path, str] = {}
        self.monitors: dict[Path, SystemMetricsMonitor] = {}

    @cached_property
    def client(self) -> MlflowClient:
        """The connection; made when the first run begins, so that a mistake leaves no database."""
        return client()[0]

    def found(self, cell: Cell, config: SparseTrainConfig) -> None:
        """A finished cell was found: it was tracked when it was trained."""

    def begin(self, cell: Cell, config: SparseTrainConfig, settings: dict[str, Any]) -> None:
        """Start the cell's run, or go on with the one that its folder names."""
        card = cell.ticket.card
        tags = {
            "criterion": str(card.get("criterion")),
            "sparsity": f"{card.get('sparsity', cell.ticket.sparsity):g}",
            "ticket": cell.ticket.fingerprint,
            **{key: card[key] for key in ("autos", "corpus") if key in card},
        }
        if PARENT_VARIABLE in os.environ:
            tags["mlflow.parentRunId"] = os.environ[PARENT_VARIABLE]
        run, made = found_or_made(self.client, client()[1], cell.folder, cell.name, tags)
        self.runs[cell.folder] = run
        if not made:
            self.client.update_run(run, status="RUNNING")
        self.client.log_dict(run, settings, SETTINGS)
        if not self.client.get_run(run).data.params:  # They come last: it was begun to the end.
            self._describe(cell, config, run)
        self._watch(cell, resumed=not made)

    def _describe(self, cell: Cell, config: SparseTrainConfig, run: str) -> None:
        """Log what stays the same however often a cell is resumed."""
        card = cell.ticket.card
        log_data(self.client, run, sets.load(cell.data))
        if "corpus" in card:
            log_corpus(self.client, run, "corpus", card["corpus"])
        if card.get("criterion") != DENSE:
            with tempfile.TemporaryDirectory() as folder:
                cell.ticket.save(Path(folder, "ticket.safetensors"))
                self.client.log_artifacts(run, folder)
        known = {
            "model": card["model"],
            "data": plain(cell.data),
            "training": plain(config.training),
            "deepspeed": plain(config.deepspeed),
            "seed": cell.seed,
        }
        parameters = [Param(key, value) for key, value in flattened(known).items()]
        self.client.log_batch(run, params=parameters)

    def _watch(self, cell: Cell, *, resumed: bool) -> None:
        """Let MLflow measure CPU, memory, network, disk and GPU, unless it is told not to."""
        if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() == "false":
            return
        monitor = SystemMetricsMonitor(self.runs[cell.folder], resume_logging=resumed)
        self.monitors[cell.folder] = monitor
        monitor.start()

    def _close(self, cell: Cell, status: str) -> None:
        if cell.folder in self.monitors:
            self.monitors.pop(cell.folder).finish()
        self.client.set_terminated(self.runs[cell.folder], status)

    def epoch(self, cell: Cell, epoch: Epoch) -> None:
        """Log an epoch's metrics."""
        values = {key: value for key, value in vars(epoch).items() if key != "epoch"}
        self._log(cell, values, epoch.epoch)

    def stopped(self, cell: Cell) -> None:
        """The run was told to stop; it goes on when the training does."""
        self._close(cell, "KILLED")

    def failed(self, cell: Cell, reason: str) -> None:
        """The training failed; the same run goes on if it is started again."""
        self.client.set_tag(self.runs[cell.folder], "error", reason[:5000])
        self._close(cell, "FAILED")

    def end(self, cell: Cell, result: dict[str, Any]) -> None:
        """Log the final metrics and files; the run is finished."""
        final = ("test_accuracy", "test_loss", "parameters", "kept", "checkpoint_bytes", "seconds")
        self._log(cell, {f"final/{key}": result[key] for key in final}, 0)
        run = self.runs[cell.folder]
        for name in (RESULT, TRAINED):
            self.client.log_artifact(run, str(cell.folder / name))
        self._close(cell, "FINISHED")

    def _log(self, cell: Cell, values: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(key, float(value), now, step) for key, value in values.items()]
        self.client.log_batch(self.runs[cell.folder], metrics=metrics)


class CorpusTracker:
    """A run for every IRP run, nested in the plan's; gone on with if the plan is started again."""

    def __init__(self, parent: str, folder: Path, runs: Mapping[str, IRPConfig]) -> None:
        self.parent, self.folder, self.configs = parent, folder, runs
        self.client, self.experiment = client()
        self.runs: dict[str, str] = {}
        self.logged: dict[str, set[int]] = {}

    def levels(self, name: str, entries: Sequence[dict[str, Any]]) -> None:
        """Log levels: accuracy, density and seconds, the level as the step; each once."""
        run = self._run(name)
        now = int(time.time() * 1000)
        new = [each for each in entries if each["level"] not in self.logged[name]]
        metrics = [
            Metric(key, float(entry[key]), now, entry["level"])
            for entry in new
            for key in ("validation_accuracy", "density", "seconds", "train_loss")
        ]
        if metrics:
            self.client.log_batch(run, metrics=metrics)
        self.logged[name] |= {entry["level"] for entry in new}

    def end(self, name: str, error: str | None) -> None:
        """Close a run; `error` says why it failed."""
        run = self._run(name)
        if error:
            self.client.set_tag(run, "error", error[:5000])
        self.client.set_terminated(run, "FAILED" if error else "FINISHED")

    def _run(self, name: str) -> str:
        if name not in self.runs:
            self.runs[name] = run = self._found(name) or self._made(name)
            before = self.client.get_metric_history(run, "seconds")
            self.logged[name] = {metric.step for metric in before}
        return self.runs[name]

    def _found(self, name: str) -> str | None:
        wanted = f"tags.run_id = '{name}' and tags.`mlflow.parentRunId` = '{self.parent}'"
        runs = self.client.search_runs([self.experiment], wanted, max_results=1)
        if not runs:
            return None
        self.client.update_run(runs[0].info.run_id, status="RUNNING")
        return runs[0].info.run_id

    def _made(self, name: str) -> str:
        config = self.configs[name]
        tags = {"mlflow.parentRunId": self.parent, "run_id": name, "model": config.model.name,
                "data": config.data.name, "label": config.label}  # fmt: skip
        made = self.client.create_run(
            self.experiment, tags=tags, run_name=f"{config.model.name} seed {config.seed}"
        )
        settings = {**plain(config), "out": "", "device": config.device}
        parameters = [Param(key, value) for key, value in flattened(settings).items()]
        self.client.log_batch(made.info.run_id, params=parameters)
        return made.info.run_id


def log_figures(owner: Path, folder: Path) -> None:
    """Log a folder of figures to the run that `parent_run` has opened for `owner`."""
    server, _ = client(owner)
    server.log_artifacts(read_json(owner / RUN_FILE)["run_id"], str(folder), "report")


def flattened(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings as dotted names and short texts."""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)[:500]
    return flat


def found_or_made(
    server: MlflowClient, experiment: str, folder: Path, name: str, tags: dict[str, str]
) -> tuple[str, bool]:
    """Return the run that belongs to a folder, and whether it was made now.

    A key is written to the folder first and then to the run's tags, so a kill in between does
    not lead to a second run.
    """
    path = folder / RUN_FILE
    known = read_json(path) if path.is_file() else {"key": secrets.token_hex(8)}
    if "run_id" in known:
        return known["run_id"], False
    write_json(path, known)
    runs = server.search_runs([experiment], f"tags.folder_key = '{known['key']}'", max_results=1)
    made = not runs
    if made:
        run = server.create_run(
            experiment, tags={**tags, "folder_key": known["key"]}, run_name=name
        )
    else:
        run = runs[0]
    write_json(path, {**known, "run_id": run.info.run_id})
    return run.info.run_id, made


@contextmanager
def parent_run(name: str, folder: Path) -> Iterator[str]:
    """Open a run that others nest under (through the environment); the same one every time."""
    server, experiment = client(folder)
    run, made = found_or_made(server, experiment, folder, name, {})
    if not made:
        server.update_run(run, status="RUNNING")
    before = os.environ.get(PARENT_VARIABLE)
    os.environ[PARENT_VARIABLE] = run
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    finally:
        server.set_terminated(run, status)
        if before is None:
            del os.environ[PARENT_VARIABLE]
        else:
            os.environ[PARENT_VARIABLE] = before


def log_data(server: MlflowClient, run: str, source: DataSource) -> None:
    """Say which data a run is about, as an input in MLflow's sense: name and fingerprint."""
    where = {"uri": source.config.root or source.name}
    profile = {"classes": source.num_classes, "train": len(source.train),
               "validation": len(source.validation), "test": len(source.test)}  # fmt: skip
    dataset = Dataset(
        name=source.name, digest=source.fingerprint[:36], source_type="local",
        source=json.dumps(where), profile=json.dumps(profile),
    )  # fmt: skip
    server.log_inputs(run, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def log_corpus(server: MlflowClient, run: str, name: str, fingerprint: str) -> None:
    """Say which corpus a run rests on, as an input in MLflow's sense."""
    dataset = Dataset(
        name=name, digest=fingerprint[:36], source_type="local", source=json.dumps({"uri": name})
    )
    server.log_inputs(run, [DatasetInput(dataset, [InputTag("mlflow.data.context", "corpus")])])


def log_report(run: str, table: list[dict[str, Any]], figures: Sequence[Path]) -> None:
    """Log the final table and figures to a run; the same table is logged once."""
    server = MlflowClient()
    content = hashlib.sha256(json.dumps(table).encode()).hexdigest()[:8]
    name = f"results-{content}.json"
    if name not in [each.path for each in server.list_artifacts(run)]:
        server.log_table(run, {key: [row[key] for row in table] for key in table[0]}, name)
    for figure in figures:
        server.log_artifact(run, str(figure), "figures")
