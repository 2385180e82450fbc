"""The cells of a study under DeepSpeed: one after another, each on all ranks of this machine.

`run` starts DeepSpeed's launcher, which calls `train` on every rank: a GPU each, or two on a CPU.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml
from torch.distributed.elastic.utils.distributed import get_free_port

from autosparse.core.config import plain
from autosparse.core.errors import RunFailed, Stopped, UsageError
from autosparse.core.files import write_text
from autosparse.core.progress import Progress
from autosparse.study import local, plan
from autosparse.study.config import StudyConfig
from autosparse.study.grid import FAILED, StudyCell
from autosparse.study.local import Tracker
from autosparse.training.watching import StepWatch

SETTINGS = "study.yaml"
"""The study as the ranks are told it, in its folder."""
RANKS_ON_CPU = 2
"""The fewest that share anything: on a CPU, more ranks only take cores from each other."""
PATIENCE = 60.0
"""Seconds that ranks have to save in when they are told to stop."""
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
ENTRY = "autosparse.cli.study_rank"
"""The module that every rank runs."""


def run(config: StudyConfig, planned: list[StudyCell], tracker: Tracker | None = None) -> None:
    """Train every cell that is not over; one that fails is written down, and the others go on.

    Raises RunFailed where a rank dies, and Stopped where this process is told to stop.
    """
    if find_spec("deepspeed") is None:
        raise UsageError("executor deepspeed needs DeepSpeed: pip install deepspeed")
    todo = [cell for cell in planned if not cell.over]
    settings = Path(config.out) / SETTINGS
    write_text(settings, yaml.safe_dump(plain(config), sort_keys=False))
    gpus = torch.cuda.device_count()
    code = launched(
        [
            sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error",
            "--num_accelerators", str(gpus or RANKS_ON_CPU), "--master_port", str(get_free_port()),
            "--module", ENTRY, str(settings),
        ],
        {**os.environ, **({} if gpus else {"DS_ACCELERATOR": "cpu"})},
    )  # fmt: skip
    for cell in todo:
        if tracker and cell.state != "to do":
            tracker.end(cell)
    if code:
        raise RunFailed(
            f"training under DeepSpeed failed (exit code {code}); "
            "the same command goes on from here"
        )


def launched(command: list[str], environment: dict[str, str]) -> int:
    """Run a command, and tell all its processes to stop if this one is told; return its exit code.

    Raises Stopped, or KeyboardInterrupt, once they have ended.
    """
    told: list[int] = []
    # In a session of its own, so that every signal comes from here, and once.
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:

        def forward(number: int, _: object) -> None:
            told.append(number)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)

        before = {each: signal.getsignal(each) for each in STOPS}
        heard = [each for each in STOPS if before[each] is not signal.SIG_IGN]  # As nohup does.
        if threading.current_thread() is not threading.main_thread():
            heard = []  # Only that one may listen.
        for each in heard:
            signal.signal(each, forward)
        try:
            code = process.wait()
        finally:
            for each in heard:
                signal.signal(each, before[each])
    if told:
        _wait_for_all(process.pid)
    if signal.SIGINT in told:
        raise KeyboardInterrupt
    if told:
        raise Stopped("stopped; the same command goes on from here")
    return code


def _wait_for_all(group: int) -> None:
    """Wait until no process of a group is left: DeepSpeed's launcher ends before the ranks do."""
    until = time.monotonic() + PATIENCE
    with suppress(ProcessLookupError):
        while time.monotonic() < until:
            os.killpg(group, 0)
            time.sleep(0.1)


def train(config: StudyConfig) -> None:
    """Train the cells on this rank, with all the others."""
    from autosparse.integrations import deepspeed, deepspeed_ranks

    ranks, device = deepspeed_ranks.start()
    stop = deepspeed_ranks.Stopping()
    with Progress(enabled=ranks.rank == 0) as progress:
        for cell in ranks.first_says(lambda: plan.cells(config)):
            if ranks.first_says(lambda cell=cell: cell.over):
                continue
            here = replace(cell.config, device=device)
            source = ranks.together(lambda here=here: local.load(here))
            watch = StepWatch(progress, cell.name)
            try:
                ready = ranks.first_says(lambda cell=cell, source=source: local.ready(cell, source))
                deepspeed.train_one(
                    ready, local.settings(cell), source, ranks, device, stop, watch
                )  # fmt: skip
            except (RunFailed, UsageError) as error:
                if not error.everywhere:  # The other ranks do not know of it.
                    raise
                said = local.in_one_line(error)
                ranks.first_says(lambda cell=cell, said=said: cell.failed(said))
            else:
                if ranks.rank == 0:
                    (cell.folder / FAILED).unlink(missing_ok=True)
