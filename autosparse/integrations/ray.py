"""Growing a corpus with Ray: one task per IRP run, finished runs and levels found on disk."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from autosparse.core.errors import RunFailed, UsageError, UserError
from autosparse.core.files import is_local, place, read_card, write_json
from autosparse.core.progress import Bar, Progress
from autosparse.corpus import store
from autosparse.corpus.store import Corpus
from autosparse.data import identity, sets
from autosparse.integrations import JOB_VARIABLE
from autosparse.irp import plan
from autosparse.irp import run as irp
from autosparse.irp.config import CorpusConfig, IRPConfig

logger = logging.getLogger(__name__)

POLL_SECONDS, REMOTE_POLL_SECONDS = 0.5, 15.0
"""How often a corpus on disk, or at a URL, where looking costs requests, is looked at."""
RETRIES = 10
"""How often a run is tried again after its worker or node has died: as good as always, but not
for ever where a run kills its worker."""
FAILED = "failed.json"
SHOWN = 4
"""The bar names at most this many running runs."""
HOME_VARIABLE = "AUTOSPARSE_HOME"


@dataclass
class Grown:
    """What `grow` did."""

    folder: Path
    found: list[str] = field(default_factory=list)
    """run_ids that were finished before."""
    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """run_id -> the error, in one line."""


def output_folder(out: str) -> Path:
    """Return where results go: a URL as it is; `out`, or below AUTOSPARSE_HOME inside a Ray job.

    `ray job submit --working-dir` runs the script in a temporary copy, where results would be
    lost; so a relative path is taken from AUTOSPARSE_HOME (default: autosparse in the home
    folder) there.
    """
    if not is_local(out):
        return place(out)
    path = Path(out).expanduser()
    if path.is_absolute() or JOB_VARIABLE not in os.environ:
        return path.absolute()
    return Path(os.environ.get(HOME_VARIABLE, "~/autosparse")).expanduser() / path


def _is_given() -> bool:
    """Whether there is a cluster to join, so that we do not start Ray ourselves."""
    return "RAY_ADDRESS" in os.environ or JOB_VARIABLE in os.environ


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names, or start a local one on the loopback."""
    if ray.is_initialized():
        return
    if _is_given():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        return
    ray.init(
        address="local",
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def grow(config: CorpusConfig) -> Grown:
    """Do every run of the plan that is not finished, as many at a time as the cluster fits.

    The largest begin first. A run that fails for its own reason is recorded in its folder's
    `failed.json` and does not stop the others; a worker or node that dies is retried, from the
    last finished level.
    """
    folder = output_folder(config.out)
    runs = plan.runs(config, folder)
    grown = Grown(folder)
    grown.found = [name for name in runs if store.is_finished(folder / name)]
    for name in grown.found:
        irp.tidy(folder / name)
    _check_found(runs, grown)
    todo = {name: run for name, run in runs.items() if name not in grown.found}
    if todo:
        connect()
        fits = (config.cpus_per_run, config.gpus_per_run, config.memory_gb_per_run)
        check_fits(*fits, what="run", per="run")
        with _tracked(config, folder, runs) as tracker:
            _run_all(todo, config, grown, _Watch(folder, todo, tracker))
    if grown.found or grown.done:
        Corpus(folder).write_index()
    return grown


def _check_found(runs: dict[str, IRPConfig], grown: Grown) -> None:
    """Raise UsageError if finished runs are of other data of the same name than are there now."""
    with sets.remembered():
        for name in grown.found:
            irp.check_found(grown.folder / name, sets.if_there(runs[name].data))


def check_fits(cpus: float, gpus: float, memory_gb: float, what: str, per: str) -> None:
    """Raise UsageError if no node could ever hold a `what`; Ray would wait for ever.

    `per` ends the names of the settings: run or trial.
    """
    if _is_given():  # An autoscaler may still add nodes.
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, setting, unit, wanted in (
        ("CPU", "cpus", 1, cpus), ("GPU", "gpus", 1, gpus), ("memory", "memory_gb", 1e9, memory_gb)
    ):  # fmt: skip
        most = max((node.get(name, 0.0) for node in nodes), default=0.0) / unit
        if wanted > most:
            raise UsageError(
                f"a {what} asks for {wanted:g} {name}{' in GB' if unit > 1 else ''}, but no node "
                f"has more than {most:.3g}; lower {setting}_per_{per}"
            )


def _run_all(todo: dict[str, IRPConfig], config: CorpusConfig, grown: Grown, watch: _Watch) -> None:
    task = ray.remote(
        max_retries=RETRIES,
        num_cpus=config.cpus_per_run,
        num_gpus=config.gpus_per_run,
        memory=int(config.memory_gb_per_run * 1e9),
    )(_one_run)
    order = plan.largest_first(todo)
    waiting = {task.remote(todo[name], config.cpus_per_run): name for name in order}
    with Progress() as progress:
        watch.bar = progress.bar(f"growing {grown.folder.name}", watch.levels, "levels")
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=watch.pause)
            for reference in ready:
                name = waiting.pop(reference)
                _collect(name, reference, grown)
                watch.ended(name, grown.failed.get(name))
            watch.look()


def _collect(name: str, reference: Any, grown: Grown) -> None:
    try:
        error = ray.get(reference)
    except ray.exceptions.RayError as died:
        error = str(died).strip().splitlines()[-1]
    failed = grown.folder / name / FAILED
    if error is None:
        grown.done.append(name)
        failed.unlink(missing_ok=True)
        return
    grown.failed[name] = str(error)
    try:
        write_json(failed, {"error": error, "time": time.time()})
    except UserError:
        logger.warning("%s could not be written", failed)


class _Watch:
    """Looks at the levels that appear in the folders of the runs, and tells of them."""

    def __init__(self, folder: Path, todo: dict[str, IRPConfig], tracker: Any) -> None:
        self.folder, self.todo, self.tracker = folder, todo, tracker
        self.levels = sum(run.levels + 1 for run in todo.values())
        self.seen: dict[str, list[dict[str, Any]]] = {name: [] for name in todo}
        self.over: set[str] = set()
        self.bar: Bar | None = None
        self.pause = POLL_SECONDS if is_local(folder) else REMOTE_POLL_SECONDS

    def look(self) -> None:
        """Read the levels that are new; move the bar."""
        for name in self.todo:
            if name not in self.over:
                self._read(name)
        if self.bar is None:
            return
        running = [
            f"{self.todo[name].model.name} {len(levels)}/{self.todo[name].levels + 1}"
            + (f" {levels[-1]['validation_accuracy']:.0%}" if levels else "")
            for name, levels in self.seen.items()
            if levels and name not in self.over
        ]
        done = sum(len(levels) for levels in self.seen.values())
        if done != self.bar.done:
            shown = ", ".join(running[:SHOWN]) + (" …" if len(running) > SHOWN else "")
            self.bar.describe(
                f"growing {self.folder.name}: {len(self.over)}/{len(self.todo)} runs"
                + (f" ({shown})" if shown else "")
            )
            self.bar.set(done)

    def ended(self, name: str, error: str | None) -> None:
        """Take note of a run that finished or failed."""
        self._read(name)
        self.over.add(name)
        if self.tracker:
            self.tracker.end(name, error)

    def _read(self, name: str) -> None:
        folder, levels = self.folder / name, self.seen[name]
        try:
            if store.is_finished(folder):
                new = read_card(folder / store.RUN)["levels"][len(levels) :]
            else:
                paths = sorted(folder.glob("levels/*/level.safetensors"))
                new = [read_card(path) for path in paths[len(levels) :]]
        except UserError:
            return  # Just being folded into the finished run, or damaged: the run says so.
        levels += new
        if self.tracker and new:
            self.tracker.levels(name, new)


@contextmanager
def _tracked(config: CorpusConfig, folder: Path, runs: dict[str, IRPConfig]) -> Iterator[Any]:
    """Give a tracker that logs to MLflow, or None."""
    if not config.tracking:
        yield None
        return
    from autosparse.integrations import tracking

    with tracking.corpus_tracker(runs, folder) as tracker:
        yield tracker


def _one_run(run: IRPConfig, cpus: float) -> str | None:
    """Do one run inside a Ray task; return its error in one line, or None."""
    import torch

    torch.set_num_threads(max(1, int(cpus)))
    try:
        with identity.looked_at_once():
            irp.run_irp(run, wait=True)
    except UserError as error:
        return " ".join(str(error).split())
    return None


def raise_if_failed(grown: Grown) -> None:
    """Raise RunFailed that names the runs that failed."""
    if grown.failed:
        lines = "; ".join(f"{name}: {error}" for name, error in grown.failed.items())
        total = len(grown.failed) + len(grown.done) + len(grown.found)
        raise RunFailed(
            f"{len(grown.failed)} of {total} IRP runs failed: {lines}; "
            "the same command tries them again"
        )
