"""Checkpoints of DeepSpeed that count only when they are whole.

`FOLDER/step00000120/` holds what DeepSpeed wrote; `checkpoint.json` in it is written last, with
the size and SHA-256 of every file. A folder without it, or whose files differ, is named and
passed over; the newest whole one is used. DeepSpeed's own files are pickles: load only your own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from autosparse.core.errors import UserError
from autosparse.core.files import read_json, remove_tree, sha256_of_file, write_json
from autosparse.training.steppers import Ranks

logger = logging.getLogger(__name__)

MARKER = "checkpoint.json"
UNIVERSAL = "universal"
KEEP = 2
"""How many of the newest checkpoints stay."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint."""

    folder: Path
    step: int
    world_size: int
    """Ranks that wrote it."""

    @property
    def tag(self) -> str:
        return self.folder.name


def tag_of(step: int) -> str:
    """Return the name of a step's folder."""
    return f"step{step:08d}"


def begin(parent: Path, step: int, ranks: Ranks) -> None:
    """Remove what a start that was cut left of a step's checkpoint; called by all ranks."""
    if ranks.rank == 0:
        remove_tree(parent / tag_of(step))
    dist.barrier()


def commit(parent: Path, step: int, ranks: Ranks) -> None:
    """Mark a step's checkpoint as whole, once all ranks have written it; called by all ranks.

    The ranks share out the hashing. Older checkpoints than the newest two go, and those of later
    steps, which were passed over.
    """
    dist.barrier()
    folder = parent / tag_of(step)
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    mine = {name: _entry(folder / name) for name in names[ranks.rank :: ranks.world_size]}
    everyone: list[dict] = [{} for _ in range(ranks.world_size)]
    dist.all_gather_object(everyone, mine)

    def mark() -> None:
        files = {name: entry for part in everyone for name, entry in part.items()}
        content = {"step": step, "world_size": ranks.world_size, "files": files}
        write_json(folder / MARKER, content)
        past = [p for p in _folders(parent) if p.name <= folder.name and (p / MARKER).is_file()]
        for other in set(_folders(parent)) - set(past[:KEEP]):
            remove_tree(other)

    ranks.first_says(mark)


def _entry(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:  # On disk before the marker says so.
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}


def newest(parent: Path, ranks: Ranks) -> Checkpoint | None:
    """Return the newest whole checkpoint, as rank 0 finds it; called by all ranks."""

    def look() -> Checkpoint | None:
        for folder in _folders(parent):
            problem = _problem(folder)
            if problem is None:
                content = read_json(folder / MARKER)
                return Checkpoint(folder, content["step"], content["world_size"])
            logger.warning("checkpoint %s is passed over: %s", folder, problem)
        return None

    return ranks.first_says(look)


def _folders(parent: Path) -> list[Path]:
    """Return the checkpoints' folders, newest first."""
    return sorted((p for p in parent.glob("step*") if p.is_dir()), reverse=True)


def _problem(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint; None if it is whole."""
    if not (folder / MARKER).is_file():
        return "it was not written to its end"
    try:
        content = read_json(folder / MARKER)
        if content["step"] != int(folder.name[len("step") :]) or content["world_size"] < 1:
            return f"{MARKER} is damaged"
        for name, entry in content["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"] or sha256_of_file(path) != entry["sha256"]:
                return f"{name} is not what was written"
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return f"{MARKER} is damaged"
    return None


def universal(checkpoint: Checkpoint, ranks: Ranks) -> Path:
    """Convert a checkpoint for any number of ranks; return its folder; called by all ranks.

    DeepSpeed's own converter runs on rank 0; a conversion that was cut is made anew.
    """
    folder = checkpoint.folder.parent / f"{UNIVERSAL}-{checkpoint.tag}"

    def convert() -> None:
        marker = folder / MARKER
        source = {"from": checkpoint.tag, "sha256": sha256_of_file(checkpoint.folder / MARKER)}
        if not marker.is_file() or read_json(marker) != source:
            remove_tree(folder)
            _convert(checkpoint.folder, folder)
            write_json(marker, source)

    ranks.first_says(convert)
    return folder


def _convert(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        ds_to_universal.main(arguments)
