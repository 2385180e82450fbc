"""The cells of a study under DeepSpeed: one after another, each on all ranks of this machine.

`run` starts DeepSpeed's launcher, which calls `train` on every rank: a GPU each, or two on a CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml
from torch.distributed.elastic.utils.distributed import get_free_port

from autosparse.core.config import plain
from autosparse.core.errors import RunFailed, UsageError
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
ENTRY = "autosparse.cli.study_rank"
"""The module that every rank runs."""


def run(config: StudyConfig, planned: list[StudyCell], tracker: Tracker | None = None) -> None:
    """Train every cell that is not over; raise RunFailed at the first that fails."""
    if find_spec("deepspeed") is None:
        raise UsageError("executor deepspeed needs DeepSpeed: pip install deepspeed")
    todo = [cell for cell in planned if not cell.over]
    settings = Path(config.out) / SETTINGS
    write_text(settings, yaml.safe_dump(plain(config), sort_keys=False))
    gpus = torch.cuda.device_count()
    done = subprocess.run(
        [
            sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error",
            "--num_accelerators", str(gpus or RANKS_ON_CPU), "--master_port", str(get_free_port()),
            "--module", ENTRY, str(settings),
        ],
        env={**os.environ, **({} if gpus else {"DS_ACCELERATOR": "cpu"})},
        check=False,
    )  # fmt: skip
    for cell in todo:
        if cell.over and tracker:
            tracker.end(cell)
    if done.returncode:
        raise RunFailed(
            f"training under DeepSpeed failed (exit code {done.returncode}); "
            "the same command goes on from here"
        )


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
            ready = ranks.first_says(lambda cell=cell, source=source: local.ready(cell, source))
            watch = StepWatch(progress, cell.name)
            deepspeed.train_one(
                ready, local.settings(cell), source, ranks, device, stop, watch
            )  # fmt: skip
            if ranks.rank == 0:
                (cell.folder / FAILED).unlink(missing_ok=True)
