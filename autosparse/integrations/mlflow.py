"""MLflow: runs with their config, inputs and metrics.

Tracking goes to MLFLOW_TRACKING_URI, or to `mlflow.db` (SQLite) in the current folder.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LifecycleStage, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from sqlalchemy.exc import SQLAlchemyError

from autosparse.core.config import plain
from autosparse.core.errors import UserError
from autosparse.core.files import is_local, read_json, write_json
from autosparse.criteria.pruning import DENSE
from autosparse.data import sets
from autosparse.data.sets import DataSource
from autosparse.integrations import JOB_VARIABLE, REFUSED, RUN_FILE
from autosparse.study.config import SparseTrainConfig
from autosparse.study.trainings import RESULT, SETTINGS, TRAINED, Cell
from autosparse.training.steppers import Epoch

for chatty in ("mlflow", "alembic"):
    logging.getLogger(chatty).setLevel(logging.WARNING)
logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)  # Spooled warns, once.

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
_AWAY: set[Path] = set()
"""Folders of studies and corpora that MLflow could not be told of."""
ACTIVE = LifecycleStage.ACTIVE
EXPERIMENT = "autosparse"
CELL = "cell"
"""Tag that names the cell of a study's run."""
FINAL = ("test_accuracy", "test_loss", "validation_accuracy", "parameters", "kept",
         "checkpoint_bytes", "seconds", "image_passes")  # fmt: skip
"""What is logged of a result, as `final/…`."""
LONGEST_PARAMETER, LONGEST_TAG, LONGEST_DIGEST = 500, 5000, 36
"""Characters that every MLflow server takes (mlflow/utils/validation.py; newer ones take more)."""
KIND = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": "A run for each sweep, comparison and corpus, with its cells nested in "
    "it; the page of a sweep's run says what is best. Checkpoints to use are under Models.",
}
"""Tags: shown as an experiment of training (not of language models), with a description."""


def tracking_uri(folder: Path | None = None) -> str:
    """Return MLFLOW_TRACKING_URI, or else the SQLite database in the current folder.

    Inside a job of Ray's that is a temporary copy, so there it is the one in `folder`, a study's or
    corpus's; and so it is where an earlier version has made one, or the current folder may not be
    written to.
    """
    here = Path.cwd()
    if folder is not None and is_local(folder):
        own = Path(folder).absolute()
        written = os.access(here, os.W_OK)  # By SQLite, also beside its file.
        if JOB_VARIABLE in os.environ or (own / "mlflow.db").is_file() or not written:
            here = own
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{here / 'mlflow.db'}"


def client(folder: Path | None = None) -> tuple[MlflowClient, str]:
    """Return a client and the id of our experiment, which is made if need be."""
    uri = tracking_uri(folder)
    mlflow.set_tracking_uri(uri)
    server = MlflowClient()
    experiment = server.get_experiment_by_name(EXPERIMENT)
    if experiment is not None:
        return server, experiment.experiment_id
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()
    return server, server.create_experiment(EXPERIMENT, artifact_location=location, tags=KIND)


class Tracker:
    """An Observer: one MLflow run per cell, gone on with if the cell is resumed."""

    def __init__(self) -> None:
        self.runs: dict[Path, str] = {}
        self.monitors: dict[Path, SystemMetricsMonitor] = {}

    @cached_property
    def server(self) -> tuple[MlflowClient, str]:
        """The connection; made when the first run begins, so that a mistake leaves no database."""
        return client()

    @property
    def client(self) -> MlflowClient:
        return self.server[0]

    def found(self, cell: Cell, config: SparseTrainConfig) -> None:
        """Do nothing: a finished cell was logged when it was trained."""

    def begin(self, cell: Cell, config: SparseTrainConfig, settings: dict[str, Any]) -> None:
        """Start the cell's run, or go on with the one that its folder names."""
        card = cell.ticket.card
        tags = {
            "criterion": str(card.get("criterion")),
            "sparsity": f"{card.get('sparsity', cell.ticket.sparsity):g}",
            "ticket": cell.ticket.fingerprint,
            **{key: card[key] for key in ("autos", "corpus") if key in card},
        }
        run, made = found_or_made(*self.server, cell.folder, cell.name, tags)
        self.runs[cell.folder] = run
        if not made:
            self.client.update_run(run, status="RUNNING")
        self.client.log_dict(run, settings, SETTINGS)
        if not self.client.get_run(run).data.params:  # Logged last, so without them all is.
            self._describe(cell, config, run)
        self._watch(cell, resumed=not made)

    def _describe(self, cell: Cell, config: SparseTrainConfig, run: str) -> None:
        """Log data, ticket and settings: once, however often a cell is resumed."""
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
        log_settings(self.client, run, known)

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
        log_steps(self.client, self.runs[cell.folder], [vars(epoch)], "epoch")

    def stopped(self, cell: Cell) -> None:
        """Mark the run as killed; it goes on when the training does."""
        self._close(cell, "KILLED")

    def failed(self, cell: Cell, reason: str) -> None:
        """Say why the training failed; the same run goes on if it is started again."""
        self.client.set_tag(self.runs[cell.folder], "error", reason[:LONGEST_TAG])
        self._close(cell, "FAILED")

    def end(self, cell: Cell, result: dict[str, Any]) -> None:
        """Log the final metrics and files; the run is finished."""
        log_result(self.client, self.runs[cell.folder], cell.folder, result)
        self._close(cell, "FINISHED")


class NestedRuns:
    """Runs nested in a parent's, each known by the value of a tag; no step is logged twice.

    Args:
        parent: the run that they are nested in.
        tag: names a run among its siblings.
        step: key of the entries that says which step they are of.
        folder: whose database is asked, see `tracking_uri`.
    """

    def __init__(self, parent: str, tag: str, step: str, folder: Path | None = None) -> None:
        self.parent, self.tag, self.step = parent, tag, step
        self.client, self.experiment = client(folder)
        self.logged: dict[str, set[int]] = {}
        """Of the runs that are open: the steps that MLflow has."""
        wanted = f"tags.`mlflow.parentRunId` = '{parent}'"
        known = mlflow.search_runs([self.experiment], wanted, output_format="list")
        self.runs = {run.data.tags.get(tag, run.info.run_id): run.info.run_id for run in known}
        self.finished = {
            run.data.tags.get(tag, "") for run in known if run.info.status == "FINISHED"
        }

    def opened(self, name: str, title: str, tags: dict[str, str], settings: dict[str, Any]) -> str:
        """Return a run; made with what is said of it if need be, opened again if it was closed."""
        if name in self.logged:
            return self.runs[name]
        if name in self.runs:
            self.client.update_run(self.runs[name], status="RUNNING")
            before = self.client.get_metric_history(self.runs[name], "train_loss")
            self.logged[name] = {metric.step for metric in before}
        else:
            tags = {"mlflow.parentRunId": self.parent, self.tag: name, **tags}
            made = self.client.create_run(self.experiment, tags=tags, run_name=title)
            self.runs[name], self.logged[name] = made.info.run_id, set()
            log_settings(self.client, self.runs[name], settings)
        return self.runs[name]

    def log(self, name: str, entries: Iterable[dict[str, Any]]) -> None:
        """Log those entries to an open run that are of new steps."""
        new = [entry for entry in entries if entry[self.step] not in self.logged[name]]
        log_steps(self.client, self.runs[name], new, self.step)
        self.logged[name] |= {entry[self.step] for entry in new}

    def close(self, name: str, error: str | None = None) -> None:
        """Close an open run; `error` says why it failed."""
        if error:
            self.client.set_tag(self.runs[name], "error", error[:LONGEST_TAG])
        state = "FINISHED" if error is None else "FAILED"
        self.client.set_terminated(self.runs[name], state)


def nested_run(server: MlflowClient, experiment: str, parent: str, cell: str) -> str | None:
    """Return the run of a study's cell; None where MLflow does not know of it."""
    wanted = f"tags.{CELL} = '{cell}' and tags.`mlflow.parentRunId` = '{parent}'"
    runs = server.search_runs([experiment], wanted, max_results=1)
    return runs[0].info.run_id if runs else None


def log_steps(
    server: MlflowClient, run: str, entries: Sequence[Mapping[str, Any]], step: str
) -> None:
    """Log all numbers of some entries as metrics, each entry at its own step."""
    now = int(time.time() * 1000)
    metrics = [
        Metric(key, float(value), now, entry[step])
        for entry in entries
        for key, value in entry.items()
        if key != step
    ]
    if metrics:
        server.log_batch(run, metrics=metrics)


def log_result(server: MlflowClient, run: str, folder: Path, result: Mapping[str, Any]) -> None:
    """Log what a training has reached, and its files."""
    final = {f"final/{name}": result[name] for name in FINAL}
    log_steps(server, run, [{"step": 0, **final}], "step")
    for name in (RESULT, TRAINED):
        server.log_artifact(run, str(folder / name))


def log_settings(server: MlflowClient, run: str, settings: dict[str, Any]) -> None:
    """Log nested settings as parameters: dotted names and short texts."""
    parameters = [Param(key, value) for key, value in flattened(settings).items()]
    server.log_batch(run, params=parameters)


def log_figures(owner: Path, folder: Path) -> None:
    """Log a folder of figures to the run that `parent_run` has opened for `owner`."""

    def send() -> None:
        server, _ = client(owner)
        run = run_of(server, owner)
        if run is not None:
            server.log_artifacts(run, str(folder), "report")

    tried(owner, send)


def flattened(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings as dotted names and texts, cut to LONGEST_PARAMETER."""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)[:LONGEST_PARAMETER]
    return flat


def run_of(server: MlflowClient, folder: Path) -> str | None:
    """Return the run that a folder names; None if it names none, or one that is not there."""
    path = folder / RUN_FILE
    named = read_json(path).get("run_id") if path.is_file() else None
    if named is None:
        return None
    try:
        return named if server.get_run(named).info.lifecycle_stage == ACTIVE else None
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def found_or_made(
    server: MlflowClient, experiment: str, folder: Path, name: str, tags: dict[str, str]
) -> tuple[str, bool]:
    """Return the run that belongs to a folder, and whether it was made now.

    A new one is made where the server does not have, or no more, the run that the folder names.
    A key is written to the folder first and then to the run's tags, so a kill in between does
    not lead to a second run.
    """
    path = folder / RUN_FILE
    known = read_json(path) if path.is_file() else {"key": secrets.token_hex(8)}
    there = run_of(server, folder)
    if there is not None:
        return there, False
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


def tried(folder: Path, send: Callable[[], Answer]) -> Answer | None:
    """Return what `send` does for a study or corpus; None, told once, where MLflow is away.

    This command does not ask again then: every time may take minutes.
    """
    if folder in _AWAY:
        return None
    try:
        return send()
    except (MlflowException, SQLAlchemyError, OSError) as error:
        if getattr(error, "error_code", "") not in REFUSED:
            _AWAY.add(folder)
        logger.warning(
            "MLflow cannot be told (%s); %s goes on without it",
            " ".join(str(error).split())[:200], folder.name,
        )  # fmt: skip
        return None


@contextmanager
def parent_run(
    name: str, folder: Path, tracker: Callable[[str], Answer]
) -> Iterator[Answer | None]:
    """Open a run that others are nested in, the same one every time, and give what tracks those.

    Gives None where MLflow cannot be reached.
    """
    _AWAY.discard(folder)

    def opened() -> tuple[MlflowClient, str, Answer]:
        server, experiment = client(folder)
        run, made = found_or_made(server, experiment, folder, name, {})
        if not made:
            server.update_run(run, status="RUNNING")
        try:
            return server, run, tracker(run)
        except UserError:  # Of the data, say.
            server.set_terminated(run, "FAILED")
            raise

    open_now = tried(folder, opened)
    if open_now is None:
        yield None
        return
    server, run, tracks = open_now
    status = "FAILED"
    try:
        yield tracks
        status = "FINISHED"
    finally:
        tried(folder, lambda: server.set_terminated(run, status))


def log_data(server: MlflowClient, run: str, source: DataSource) -> None:
    """Say which data a run is about, as an input in MLflow's sense: name and fingerprint."""
    profile = {"classes": source.num_classes, "train": len(source.train),
               "validation": len(source.validation), "test": len(source.test)}  # fmt: skip
    where = source.config.root or source.name
    _log_input(server, run, source.name, source.fingerprint, where, "training", json.dumps(profile))


def log_corpus(server: MlflowClient, run: str, name: str, fingerprint: str) -> None:
    """Say which corpus a run rests on, as an input in MLflow's sense."""
    _log_input(server, run, name, fingerprint, name, "corpus")


def _log_input(
    server: MlflowClient, run: str, name: str, fingerprint: str, where: str, context: str,
    profile: str | None = None,
) -> None:  # fmt: skip
    dataset = Dataset(
        name=name, digest=fingerprint[:LONGEST_DIGEST], source_type="local",
        source=json.dumps({"uri": where}), profile=profile,
    )  # fmt: skip
    server.log_inputs(run, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])
