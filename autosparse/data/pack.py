"""Packing images into shards: `autosparse shards pack SRC DST`.

Where an image goes depends only on the list of images, the options and the seed. A finished shard
has a record of its sources under DST/.packing, and is kept when packing is started again.
The manifest is written last, with an index of the samples and timm's `_info.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from autosparse.core.config import identity
from autosparse.core.errors import RunFailed, UsageError
from autosparse.core.files import (
    local_place,
    read_json,
    remove_tree,
    replacing,
    sha256_of_file,
    write_json,
)
from autosparse.core.locks import claimed
from autosparse.core.ranges import check_ranges
from autosparse.data.config import DataConfig, PackConfig
from autosparse.data.decode import BadImage, count_bad, too_many
from autosparse.data.encode import Picture, encoded
from autosparse.data.manifest import (
    FORMAT,
    MANIFEST,
    SPLITS,
    Shard,
    check_content,
    check_size,
    read_manifest,
)
from autosparse.data.memory import MemorySplit
from autosparse.data.tars import BLOCK, INDEX, write_index

Sample = tuple[Picture, int]
RECORDS, INFO = ".packing", "_info.json"
BAD_IMAGES = "max_bad_images"
"""The setting that says how many images may be left out."""
RANGES = {
    "resize": "whole and at least 1",
    "quality": "whole and at least 1 and at most 100",
    "per_shard": "whole and at least 1",
    "seed": "whole and at least 0 and at most 4294967295",
    "validation_fraction": "above 0 and below 1",
    "workers": "whole and at least 1",
    "max_bad_images": "whole and at least 0",
}


@dataclass(frozen=True)
class Task:
    """One shard to write: its samples in order, and a hash of all that makes it."""

    name: str
    split: str
    samples: Sequence[Sample]
    made_of: str


def pack(
    source: str,
    folder: str | Path,
    config: PackConfig | None = None,
    *,
    on_start: Callable[[int], None] | None = None,
    on_shard: Callable[[Shard], None] | None = None,
) -> list[Shard]:
    """Pack an image folder, or a torchvision set by name, into a folder of shards.

    Args:
        source: a folder of images as for `data.name: folder`, or cifar10, mnist …
        folder: where the shards go.
        config: how; bytes are copied unchanged unless `resize` or `quality` is set.
        on_start: called with the number of images.
        on_shard: called with every shard, when it is written, or was there already.
    """
    config = config or PackConfig()
    check_ranges(config, RANGES)
    root = local_place(folder)
    parts, classes = _listed(source, config)
    tasks = _plan(parts, config)
    return write(tasks, classes, root, config, on_start=on_start, on_shard=on_shard)


def _listed(source: str, config: PackConfig) -> tuple[dict[str, list[Sample]], list[str]]:
    from autosparse.data.folder import parts_of
    from autosparse.data.torchvision import SETS, class_names, load_torchvision

    if source not in SETS or Path(source).is_dir():
        parts, classes = parts_of(Path(source).expanduser(), config.validation_fraction)
        return {split: list(parts[split]) for split in SPLITS}, classes
    data = DataConfig(source, config.root, validation_fraction=config.validation_fraction)
    loaded = load_torchvision(data)
    return {split: _pixels(getattr(loaded, split)) for split in SPLITS}, class_names(data)


def _pixels(split: MemorySplit) -> list[Sample]:
    images = split.images.permute(0, 2, 3, 1).squeeze(-1).numpy()
    return list(zip(images, split.labels.tolist(), strict=True))


def _plan(parts: dict[str, list[Sample]], config: PackConfig) -> list[Task]:
    """Shuffle every split and cut it into shards."""
    generator = torch.Generator().manual_seed(config.seed)
    shuffled = {
        split: [samples[n] for n in torch.randperm(len(samples), generator=generator).tolist()]
        for split, samples in parts.items()
    }
    return _cut(shuffled, config)


def _cut(parts: dict[str, list[Sample]], config: PackConfig) -> list[Task]:
    tasks = []
    for split, samples in parts.items():
        for number, start in enumerate(range(0, len(samples), config.per_shard)):
            some = samples[start : start + config.per_shard]
            name = f"{split}-{number:06d}.tar"
            tasks.append(Task(name, split, some, _made_of(some, config)))
    return tasks


def _made_of(samples: Sequence[Sample], config: PackConfig) -> str:
    digest = hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode())
    for picture, label in samples:
        if isinstance(picture, Path):
            digest.update(f"{picture} {_state(picture)}".encode())
        else:
            digest.update(hashlib.sha256(bytes(picture)).digest())
        digest.update(f" {label}\n".encode())
    return digest.hexdigest()


def _state(path: Path) -> str:
    """Return a file's size and time; packing reports one that is missing."""
    try:
        facts = path.stat()
    except OSError:
        return "missing"
    return f"{facts.st_size} {facts.st_mtime_ns}"


def write(
    tasks: list[Task],
    classes: list[str],
    root: Path,
    config: PackConfig,
    *,
    on_start: Callable[[int], None] | None = None,
    on_shard: Callable[[Shard], None] | None = None,
) -> list[Shard]:
    """Write the shards that are not there yet, then index, `_info.json` and manifest.

    Raises UsageError if another process is packing into the folder.
    """
    plan = hashlib.sha256(" ".join(task.made_of for task in tasks).encode()).hexdigest()
    if (root / MANIFEST).exists():
        return _finished(root, plan)
    with claimed(root) as claim:
        if (root / MANIFEST).exists():  # Another process has just finished.
            return _finished(root, plan)
        _tidy(root, tasks)
        records, bad = _records(_written(tasks, root, config, on_start), config, on_shard)
        if claim is not None:
            claim.check()
        shards = [
            Shard(**records[each.name]["shard"]) for each in tasks if records[each.name]["members"]
        ]
        members = {shard.name: torch.tensor(records[shard.name]["members"]) for shard in shards}
        write_index(root / INDEX, members, shards)
        write_json(root / INFO, _info(shards))
        content = {
            "format": FORMAT,
            "classes": classes,
            "shards": [asdict(shard) for shard in shards],
            "packed": plan,
            **({"left_out": sorted(bad)} if bad else {}),
        }
        write_json(root / MANIFEST, content)
        remove_tree(root / RECORDS)
    return shards


def _records(
    written: Iterable[dict[str, Any]],
    config: PackConfig,
    on_shard: Callable[[Shard], None] | None,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the records of all shards by name, as they come in, and the images left out."""
    records: dict[str, dict[str, Any]] = {}
    bad: list[str] = []
    for record in written:
        records[record["shard"]["name"]] = record
        for problem in record["bad"]:
            bad.append(problem)
            count_bad(problem, BAD_IMAGES, len(bad), config.max_bad_images)
        if on_shard:
            on_shard(Shard(**record["shard"]))
    return records, bad


def _finished(root: Path, plan: str) -> list[Shard]:
    manifest = read_manifest(root / MANIFEST)
    if manifest.content.get("packed") != plan:
        raise UsageError(
            f"{root} holds shards of other images or options: choose another folder, or remove it"
        )
    for shard in manifest.shards:
        check_size(root / shard.name, shard)
    return manifest.shards


def _tidy(root: Path, tasks: list[Task]) -> None:
    """Remove half-written files of a process that was killed."""
    names = {INDEX, INFO, MANIFEST, *(task.name for task in tasks)}
    for left in root.glob(".*.tmp"):
        if left.name[1:].rsplit(".", 2)[0] in names:
            left.unlink(missing_ok=True)


def _written(
    tasks: list[Task], root: Path, config: PackConfig, on_start: Callable[[int], None] | None
) -> Iterable[dict[str, Any]]:
    """Yield every shard's record, as they are finished."""
    images = sum(len(task.samples) for task in tasks)
    if config.workers == 1:
        if on_start:
            on_start(images)
        yield from (write_shard(task, root, config) for task in tasks)
        return
    with ProcessPoolExecutor(config.workers) as pool:
        waiting = [pool.submit(write_shard, task, root, config) for task in tasks]
        if on_start:  # After the processes are forked: a progress bar has a thread.
            on_start(images)
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BrokenProcessPool:
            raise RunFailed(
                "a process that packs was killed; the same command goes on from here"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def write_shard(task: Task, root: Path, config: PackConfig) -> dict[str, Any]:
    """Write one shard and its record, unless they are there; return the record."""
    from webdataset import TarWriter  # Here: all else of autosparse does without WebDataset.

    path, kept = root / task.name, root / RECORDS / f"{task.name}.json"
    record = _kept(path, kept, task)
    if record is not None:
        return record
    members, bad = [], []
    with (
        replacing(path) as temporary,
        temporary.open("wb", buffering=1 << 20) as file,
        TarWriter(file, "", "", encoder=False, mtime=0) as tar,
    ):
        for place, (picture, label) in enumerate(task.samples):
            try:
                content, extension = encoded(picture, config)
            except BadImage as error:
                bad.append(str(error))
                if len(bad) > config.max_bad_images:
                    raise too_many(bad[-1], BAD_IMAGES, config.max_bad_images) from None
                continue
            key = f"{task.name.removesuffix('.tar').replace('-', '')}_{place:06d}"
            members.append((tar.tarstream.offset + BLOCK, len(content), label))
            # One after the other: in one sample TarWriter would sort them, and bytes would change.
            tar.write({"__key__": key, extension: content})
            tar.write({"__key__": key, "cls": str(label).encode()})
    shard = Shard(task.name, task.split, len(members), path.stat().st_size, sha256_of_file(path))
    if not members:
        path.unlink()
    record = {"made_of": task.made_of, "shard": asdict(shard), "members": members, "bad": bad}
    write_json(kept, record)
    return record


def _kept(path: Path, kept: Path, task: Task) -> dict[str, Any] | None:
    """Return the record of a shard that is finished, made of the same, and whole."""
    if not (path.is_file() and kept.is_file()):
        return None
    try:
        record = read_json(kept)
        if record["made_of"] != task.made_of:
            return None
        _ = record["bad"]
        check_content(path, Shard(**record["shard"]))
    except (UsageError, KeyError, TypeError):
        return None
    return record


def _info(shards: list[Shard]) -> dict[str, Any]:
    """Return the content of `_info.json`, which timm's reader of WebDataset uses."""
    splits = {}
    for split in SPLITS:
        mine = [shard for shard in shards if shard.split == split]
        if mine:
            splits[split] = {
                "name": split,
                "num_samples": sum(shard.count for shard in mine),
                "filenames": [shard.name for shard in mine],
                "shard_lengths": [shard.count for shard in mine],
            }
    return {"splits": splits}
