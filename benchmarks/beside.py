"""Train the cells of a study in several processes that share one GPU, without Ray.

    python -m benchmarks.beside --config configs/compare/moving_topologies_gpu.yaml --data FOLDER \\
        --out FOLDER --processes 14 --minutes 4 --json FILE

Small networks leave a GPU waiting for the host, so that many trainings fit beside one another. The
data are read once, before the processes part. Cells go in the order of the study's sparsities,
then its seeds. A finished one is found again, so several short stays add up; none is begun that
would not be over after --minutes, by the longest so far. `autosparse compare` with the same
--out then finds all that is finished, and makes the table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from dataclasses import replace
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import torch

from autosparse.cli.arguments import guarded, parse
from autosparse.core.errors import RunFailed, UsageError
from autosparse.core.files import write_json
from autosparse.core.versions import environment
from autosparse.data import sets
from autosparse.data.sets import DataSource
from autosparse.models import zoo
from autosparse.study import local, plan
from autosparse.study.config import StudyConfig
from autosparse.study.grid import StudyCell

FIRST = 20.0
"""Seconds that a training is thought to take as long as none is over."""


def in_order(config: StudyConfig) -> list[StudyCell]:
    """Return the cells, by sparsity and then by seed as the study names them; dense ones first."""
    sparsities, seeds = [0.0], []
    cells = plan.cells(config)
    for cell in cells:
        sparsities.append(cell.sparsity)
        seeds.append(cell.seed)
    return sorted(cells, key=lambda cell: (sparsities.index(cell.sparsity), seeds.index(cell.seed)))


def work(cells: list[StudyCell], source: DataSource, following: Synchronized, end: float) -> None:
    """Take one cell after the other until none is left or the time is over."""
    torch.set_num_threads(1)
    here, longest = source.to(zoo.choose_device(cells[0].config.device)), FIRST
    while time.monotonic() + longest < end:
        with following.get_lock():
            place, following.value = following.value, following.value + 1
        if place >= len(cells):
            return
        cell, started = cells[place], time.monotonic()
        try:
            accuracy = local.run_cell(cell, here)["test_accuracy"]
            told = f"{accuracy:.2%}"
        except (RunFailed, UsageError) as error:
            told = " ".join(str(error).split())
            cell.failed(told)
        seconds = time.monotonic() - started
        longest = max(longest, seconds)
        line = f"{cell.name} {cell.point or ''}: {told}, {seconds:.1f} s\n"
        os.write(1, line.encode())  # At once, so that lines of several processes stay lines.


def rows(cells: list[StudyCell]) -> list[dict[str, Any]]:
    """Return what is finished, a row a training."""
    return [
        {
            "label": cell.label, "sparsity": cell.sparsity, "seed": cell.seed, "point": cell.point,
            **{key: cell.result()[key] for key in ("test_accuracy", "data_fingerprint", "device")},
        }
        for cell in cells if cell.state == "finished"
    ]  # fmt: skip


def main(arguments: list[str]) -> None:
    """Train what there is time for, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="a study, as for autosparse compare")
    parser.add_argument("--data", help="folder of the images")
    parser.add_argument("--out", help="folder of the study")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    asked, more = parser.parse_known_args(arguments)
    end = time.monotonic() + 60 * asked.minutes
    # Asking CUDA how many devices there are would make it useless to the processes.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    config = parse(StudyConfig, ["--config", asked.config, *more], "beside", __doc__)
    if asked.data:
        config = replace(config, data=replace(config.data, root=asked.data))
    if asked.out:
        config = replace(config, out=asked.out)
    config = replace(config, out=str(Path(config.out).absolute()))
    cells = in_order(config)
    if any(
        (each.config.data, each.config.device) != (config.data, config.device) for each in cells
    ):
        raise UsageError("all cells need the same data and device, which are read once")
    source = sets.load(config.data)
    print(f"{len(cells)} cells; data read, {end - time.monotonic():.0f} s left", flush=True)
    forked = multiprocessing.get_context("fork")
    following = forked.Value("i", 0)
    todo = [cell for cell in cells if not cell.over]
    workers = [
        forked.Process(target=work, args=(todo, source, following, end))
        for _ in range(min(asked.processes, len(todo)))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = rows(cells)
    print(f"{len(found)} of {len(cells)} trainings are finished")
    if asked.json:
        write_json(asked.json, {"environment": environment(), "rows": found})
    broken = sum(bool(worker.exitcode) for worker in workers)
    if broken:  # One that breaks takes no further cells.
        raise RunFailed(f"{broken} of {len(workers)} processes broke; see above")


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
