"""Ranks, forked from a process that has imported DeepSpeed: quick to start again."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

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
    each = [([str(script), *arguments],)] * ranks
    return _forked(_run_script, each, log)


def _forked(target: Callable, arguments: list[tuple], log: Path) -> list[BaseProcess]:
    """Start a process for each of the arguments: as many ranks that know where to meet."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    shutil.rmtree(log, ignore_errors=True)
    log.mkdir(parents=True)
    port = free_port()
    processes: list[BaseProcess] = []
    for rank, own in enumerate(arguments):
        place = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(arguments),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        process = context.Process(
            target=_rank, args=(target, own, place, str(log / str(rank)))
        )  # No daemon: those may not start processes that decode images.
        process.start()
        atexit.register(process.kill)
        processes.append(process)
    return processes


def _rank(target: Callable, arguments: tuple, place: dict[str, object], log: str) -> None:
    with Path(log).open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update({name: str(value) for name, value in place.items()})
    target(*arguments)


def _run_script(arguments: list[str]) -> None:
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


class Group:
    """Two ranks that have joined one process group and call what they are told to.

    A start of DeepSpeed takes seconds; so one group serves many tests. What is called must leave
    the process as it was. After a failure the ranks may wait for different things: the next call
    starts a new group.
    """

    def __init__(self, log: Path, ranks: int = 2) -> None:
        self.log, self.ranks = log, ranks
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []

    def call(self, function: Callable, *arguments: Any, seconds: float = 120) -> list[Any]:
        """Return what a function of a module returns on every rank; its first argument is Ranks."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, arguments))
        limit = time.monotonic() + seconds
        answers = []
        for rank, pipe in enumerate(self.pipes):
            try:
                in_time = pipe.poll(max(0.0, limit - time.monotonic()))
                answers.append(pipe.recv() if in_time else (False, "it hangs"))
            except EOFError:
                answers.append((False, f"it died: {(self.log / str(rank)).read_text()[-3000:]}"))
        failed = [f"rank {n}: {said}" for n, (well, said) in enumerate(answers) if not well]
        if failed:
            self.close()
            raise AssertionError("\n".join(failed))
        return [found for _, found in answers]

    def _start(self) -> None:
        pairs = [multiprocessing.Pipe() for _ in range(self.ranks)]
        self.processes = _forked(_serve, [(theirs,) for _, theirs in pairs], self.log)
        for _, theirs in pairs:
            theirs.close()
        self.pipes = [ours for ours, _ in pairs]

    def close(self) -> None:
        """End the ranks."""
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.pipes, self.processes = [], []


def _serve(pipe: Connection) -> None:
    from autosparse.integrations import deepspeed

    ranks, _ = deepspeed.start()
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((True, function(ranks, *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


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
