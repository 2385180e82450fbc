"""Ranks of a training, forked from a process that has imported DeepSpeed: quick to start again."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import autosparse

ROOT = Path(autosparse.__file__).parent.parent
SCRIPT = ROOT / "launch" / "train_sparse.py"
PRELOADED = [
    __name__, "autosparse.integrations.deepspeed", "autosparse.cli.main",
    "autosparse.study.results", "autosparse.criteria.base",
    "deepspeed.runtime.zero.muon.muon_optimizer", "sklearn.datasets",
]  # fmt: skip
"""What takes most of a start: seconds."""
GRACE = 30
"""Seconds that DeepSpeed's launcher leaves a rank between SIGTERM and SIGKILL."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def started(
    arguments: list[str], log: Path, ranks: int = 2, script: Path = SCRIPT
) -> list[BaseProcess]:
    """Start a script on so many ranks; what rank N says goes to `log`/N."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    shutil.rmtree(log, ignore_errors=True)
    log.mkdir(parents=True)
    port = free_port()
    processes: list[BaseProcess] = []
    for rank in range(ranks):
        place = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        process = context.Process(
            target=_rank, args=(place, [str(script), *arguments], str(log / str(rank)))
        )
        process.start()
        processes.append(process)
    return processes


def _rank(place: dict[str, object], arguments: list[str], log: str) -> None:
    with Path(log).open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update({name: str(value) for name, value in place.items()})
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def ended(processes: list[BaseProcess], seconds: float) -> bool:
    """Wait for so long; return whether all have ended."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    return all(process.exitcode is not None for process in processes)


def end(processes: list[BaseProcess]) -> None:
    """Do what DeepSpeed's launcher does when a rank has failed."""
    for process in processes:
        process.terminate()
    if not ended(processes, GRACE):
        for process in processes:
            process.kill()
    assert ended(processes, GRACE), "a killed rank does not end"


def launcher(ranks: int = 2, port: str | None = None) -> list[str]:
    """Return the start of a command that DeepSpeed's launcher runs, on a machine without a GPU."""
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks),
        "--master_port", port or str(free_port()), "--log_level", "error",
    ]  # fmt: skip
