"""Looking after a folder of shards: verifying every byte, and adopting tars that others wrote."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from autosparse.data.tars import (
    FORMAT,
    INDEX,
    MANIFEST,
    Shard,
    check_content,
    check_members,
    read_index,
    read_manifest,
    scan,
    write_index,
)
from autosparse.errors import UsageError
from autosparse.files import sha256_of_file, write_json

THREADS = 4
SPLIT_WORDS = (("train", "train"), ("val", "validation"), ("test", "test"))


def verify(root: str | Path) -> Iterator[tuple[Shard, str | None]]:
    """Yield every shard of the manifest, and what is wrong with it, if anything."""
    root = Path(root)
    manifest = read_manifest(root / MANIFEST)
    index = read_index(root / INDEX, manifest.shards)

    def problem(shard: Shard) -> str | None:
        try:
            _check(root / shard.name, shard, len(manifest.classes), index.get(shard.name))
        except UsageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        yield from zip(manifest.shards, pool.map(problem, manifest.shards), strict=True)


def _check(path: Path, shard: Shard, classes: int, indexed: Tensor | None) -> None:
    check_content(path, shard)
    members = scan(path)
    check_members(members, path, shard, classes)
    if indexed is not None and not torch.equal(indexed, members):
        raise UsageError(f"shard {path} is whole, but {INDEX} says otherwise: remove {INDEX}")


def adopt(
    root: str | Path, fraction: float = 0.15, on_shard: Callable[[], None] | None = None
) -> list[Shard]:
    """Write manifest and index for tars whose names say train, val or test.

    Where there is no test shard, the validation shards are it; where there is then no validation
    shard, `fraction` of the training shards are.
    """
    root = Path(root)
    if (root / MANIFEST).exists():
        raise UsageError(f"{root / MANIFEST} is there already")
    paths = sorted(root.glob("*.tar"))
    if not paths:
        raise UsageError(f"{root} holds no tar")
    shards, members = [], {}
    for path in paths:
        members[path.name] = scan(path)
        shards.append(_described(path, len(members[path.name])))
        if on_shard:
            on_shard()
    shards = _with_all_splits(shards, fraction)
    classes = max(int(found[:, 2].max()) for found in members.values() if len(found)) + 1
    write_index(root / INDEX, members, shards)
    content = {
        "format": FORMAT,
        "classes": [str(label) for label in range(classes)],
        "shards": [asdict(shard) for shard in shards],
    }
    write_json(root / MANIFEST, content)
    return shards


def _described(path: Path, count: int) -> Shard:
    if not count:
        raise UsageError(f"shard {path} holds no sample")
    split = next((split for word, split in SPLIT_WORDS if word in path.name), None)
    if split is None:
        raise UsageError(f"shard {path}: its name says neither train, val nor test")
    return Shard(path.name, split, count, path.stat().st_size, sha256_of_file(path))


def _with_all_splits(shards: list[Shard], fraction: float) -> list[Shard]:
    splits = {shard.split for shard in shards}
    if "test" not in splits:
        shards = [
            replace(shard, split="test") if shard.split == "validation" else shard
            for shard in shards
        ]
    if "validation" not in {shard.split for shard in shards}:
        train = [shard for shard in shards if shard.split == "train"]
        held = {shard.name for shard in train[-math.ceil(fraction * len(train)) :]}
        if len(held) < len(train):
            shards = [
                replace(shard, split="validation") if shard.name in held else shard
                for shard in shards
            ]
    return shards
