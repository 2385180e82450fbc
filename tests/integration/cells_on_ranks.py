"""Called on ranks whose disks differ: which cells and results each of them is told of.

Rank 0 finds finished work in OUT/disk0, rank 1 has an empty OUT/disk1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autosparse.core.errors import UserError
from autosparse.criteria.config import PruneConfig
from autosparse.models.config import ModelConfig
from autosparse.study.cells import cells
from autosparse.study.config import SparseTrainConfig
from autosparse.study.trainings import finished
from autosparse.training.steppers import Ranks
from tests.conftest import QUICK, SMALL_DIGITS

PRUNED = PruneConfig(ModelConfig("test_byobnet"), SMALL_DIGITS, criterion="magnitude")


def configs(disk: Path) -> dict[str, SparseTrainConfig]:
    """Return what is trained, as a rank sees its own disk."""
    common = {"training": QUICK, "out": str(disk)}
    return {
        "pruned": SparseTrainConfig(prune=PRUNED, **common),
        "tickets": SparseTrainConfig(tickets=str(disk / "tickets" / "*.safetensors"), **common),
    }


def told(ranks: Ranks, out: Path) -> dict[str, Any]:
    """Return folder, content and result of each cell, and the error where no ticket is."""
    found: dict[str, Any] = {}
    for name, config in configs(out / f"disk{ranks.rank}").items():
        (cell,) = cells(config, ranks=ranks)
        result = finished(cell, ranks)
        found[name] = [str(cell.folder), cell.ticket.content_hash, result]
    nothing = SparseTrainConfig(tickets=str(out / f"disk{1 - ranks.rank}" / "*.none"))
    try:
        list(cells(nothing, ranks=ranks))
    except UserError as error:
        found["error"] = str(error)
    return found
