"""`autosparse shards`: pack images into shards, or look after a folder of shards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from autosparse.core.errors import RunFailed
from autosparse.core.progress import Progress, print_table
from autosparse.data.config import IndexConfig, PackConfig

if TYPE_CHECKING:
    from autosparse.data.manifest import Shard


def pack(source: str, folder: str, config: PackConfig) -> None:
    """Pack a folder of images, or a torchvision set, into shards."""
    from autosparse.data import pack as packing

    with Progress() as progress:
        bar = progress.bar("packing", total=0, unit="images")
        shards = packing.pack(
            source,
            folder,
            config,
            on_start=bar.of,
            on_shard=lambda shard: bar.advance(shard.count),
        )
    _print_shards(folder, shards)


def _print_shards(folder: str, shards: list[Shard]) -> None:
    rows = []
    for split in dict.fromkeys(shard.split for shard in shards):
        mine = [shard for shard in shards if shard.split == split]
        megabytes = sum(shard.bytes for shard in mine) / 1e6
        count = sum(shard.count for shard in mine)
        rows.append({"split": split, "shards": len(mine), "images": count, "MB": megabytes})
    print_table(rows, folder)


def verify(folder: str) -> None:
    """Check every byte of every shard."""
    from autosparse.data import check
    from autosparse.data.manifest import MANIFEST, read_manifest

    shards = read_manifest(Path(folder) / MANIFEST).shards
    bad = 0
    with Progress() as progress:
        bar = progress.bar("verifying", sum(shard.bytes for shard in shards) / 1e6, "MB")
        for shard, problem in check.verify(folder):
            bar.advance(shard.bytes / 1e6)
            if problem:
                bad += 1
                print(problem)
    if bad:
        raise RunFailed(f"{bad} of {len(shards)} shards in {folder} are bad")
    print(f"{len(shards)} shards in {folder}: every byte is what the manifest says")


def index(folder: str, config: IndexConfig) -> None:
    """Write manifest and index for tars that others wrote."""
    from autosparse.data.check import adopt, tars

    with Progress() as progress:
        bar = progress.bar("reading", len(tars(folder)[1]), "shards")
        shards = adopt(folder, config, on_shard=bar.advance)
    _print_shards(folder, shards)
