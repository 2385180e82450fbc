"""Growing a corpus with Ray: one task per IRP run, finished runs and levels found on disk."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

from autosparse import corpus, irp
from autosparse.config import CorpusConfig, IRPConfig
from autosparse.corpus import Corpus
from autosparse.errors import RunFailed, UserError
from autosparse.files import write_json
from autosparse.progress import Bar, Progress

POLL_SECONDS = 0.5
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
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
    """Return where results go: `out`, or below AUTOSPARSE_HOME inside a Ray job.

    `ray job submit --working-dir` runs the script in a temporary copy, where results would be
    lost; so a relative path is taken from AUTOSPARSE_HOME (default: autosparse in the home
    folder) there.
    """
    path = Path(out).expanduser()
    if path.is_absolute() or JOB_VARIABLE not in os.environ:
        return path.absolute()
    return Path(os.environ.get(HOME_VARIABLE, "~/autosparse")).expanduser() / path


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names, or start a local one on the loopback."""
    if ray.is_initialized():
        return
    if "RAY_ADDRESS" in os.environ or JOB_VARIABLE in os.environ:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        return
    ray.init(
        address="local",
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def grow(config: CorpusConfig) -> Grown:
    """Do every run of the plan that is not finished, as many at a time as the cluster fits.

    A run that fails for its own reason is recorded in its folder's `failed.json` and does not
    stop the others; a worker or node that dies is retried, from the last finished level.
    """
    folder = output_folder(config.out)
    plan = {irp.run_folder(run).name: run for run in replace(config, out=str(folder)).runs()}
    for run in plan.values():
        irp.check(run)
    grown = Grown(folder)
    grown.found = [name for name in plan if corpus.is_finished(folder / name)]
    todo = {name: run for name, run in plan.items() if name not in grown.found}
    if todo:
        connect()
        _run_all(todo, config, folder, grown)
    if grown.found or grown.done:
        Corpus(folder).write_index()
    return grown


def _run_all(todo: dict[str, IRPConfig], config: CorpusConfig, folder: Path, grown: Grown) -> None:
    task = ray.remote(max_retries=3, num_cpus=config.cpus_per_run, num_gpus=config.gpus_per_run)(
        _one_run
    )
    waiting = {task.remote(run, config.cpus_per_run): name for name, run in todo.items()}
    levels = len(todo) * (config.levels + 1)
    with Progress() as progress:
        bar = progress.bar(f"growing {folder.name}", total=levels, unit="levels")
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=POLL_SECONDS)
            for reference in ready:
                _collect(waiting.pop(reference), reference, folder, grown)
            _show(bar, todo, folder, config.levels + 1)


def _collect(name: str, reference: Any, folder: Path, grown: Grown) -> None:
    try:
        error = ray.get(reference)
    except ray.exceptions.RayError as died:
        error = str(died).strip().splitlines()[-1]
    if error is None:
        grown.done.append(name)
        return
    grown.failed[name] = str(error)
    write_json(folder / name / "failed.json", {"error": error, "time": time.time()})


def _show(bar: Bar, todo: dict[str, IRPConfig], folder: Path, per_run: int) -> None:
    """Count levels on disk; a finished run has folded its own into one file."""
    done = 0
    for name in todo:
        if corpus.is_finished(folder / name):
            done += per_run
        else:
            done += len(list((folder / name).glob("levels/*/level.safetensors")))
    if done != bar.done:
        bar.set(done)


def _one_run(run: IRPConfig, cpus: float) -> str | None:
    """Do one run inside a Ray task; return its error in one line, or None."""
    import torch

    torch.set_num_threads(max(1, int(cpus)))
    try:
        irp.run_irp(run)
    except UserError as error:
        return str(error)
    return None


def raise_if_failed(grown: Grown) -> None:
    """Raise RunFailed that names the runs that failed."""
    if grown.failed:
        lines = "; ".join(f"{name}: {error}" for name, error in grown.failed.items())
        raise RunFailed(f"{len(grown.failed)} IRP runs failed: {lines}")
