"""Run on two gloo ranks whose disks differ: write which cells and results each rank is told of.

python cells_on_ranks.py RANK STORE OUT; rank 0 finds finished work in OUT/disk0, rank 1 has an
empty OUT/disk1.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from autosparse.core.errors import UserError
from autosparse.criteria.config import PruneConfig
from autosparse.models.config import ModelConfig
from autosparse.study.cells import cells
from autosparse.study.config import SparseTrainConfig
from autosparse.study.trainings import finished
from autosparse.training.steppers import Ranks
from tests.conftest import QUICK, SMALL_DIGITS

WORLD = 2
PRUNED = PruneConfig(ModelConfig("test_byobnet"), SMALL_DIGITS, criterion="magnitude")


def configs(disk: Path) -> dict[str, SparseTrainConfig]:
    """Return what is trained, as a rank sees its own disk."""
    common = {"training": QUICK, "out": str(disk)}
    return {
        "pruned": SparseTrainConfig(prune=PRUNED, **common),
        "tickets": SparseTrainConfig(tickets=str(disk / "tickets" / "*.safetensors"), **common),
    }


def main(rank: int, store: str, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    ranks, found = Ranks(rank, WORLD), {}
    for name, config in configs(out / f"disk{rank}").items():
        (cell,) = cells(config, ranks=ranks)
        result = finished(cell, ranks)
        found[name] = [str(cell.folder), cell.ticket.content_hash, result]
    nothing = SparseTrainConfig(tickets=str(out / f"disk{1 - rank}" / "*.none"))
    try:
        list(cells(nothing, ranks=ranks))
    except UserError as error:
        found["error"] = str(error)
    (out / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
