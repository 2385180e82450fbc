"""`autosparse shards`: pack images into shards, or look after a folder of shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from autosparse.core.errors import RunFailed, UsageError, unknown
from autosparse.core.progress import Progress, print_table
from autosparse.data.config import IndexConfig, PackConfig

if TYPE_CHECKING:
    from autosparse.data.tars import Shard


def shards(arguments: list[str], config: PackConfig | IndexConfig | None = None) -> None:
    """Pack images into shards, or look after a folder of shards."""
    action, paths = arguments[0], arguments[1:]
    if action not in SHARDS_ACTIONS:
        raise unknown("shards action", action, SHARDS_ACTIONS)
    wanted = 2 if action == "pack" else 1
    if len(paths) != wanted:
        what = "what to pack and a folder for the shards" if wanted == 2 else "one folder of shards"
        raise UsageError(f"autosparse shards {action} takes {what}")
    SHARDS_ACTIONS[action](*paths, *([] if config is None else [config]))


def _shards_pack(source: str, folder: str, config: PackConfig | None = None) -> None:
    from autosparse.data.pack import pack

    with Progress() as progress:
        bar = progress.bar("packing", total=0, unit="images")
        found = pack(
            source,
            folder,
            config,
            on_start=bar.of,
            on_shard=lambda shard: bar.advance(shard.count),
        )
    _print_shards(folder, found)


def _print_shards(folder: str, found: list[Shard]) -> None:
    rows = []
    for split in dict.fromkeys(shard.split for shard in found):
        mine = [shard for shard in found if shard.split == split]
        megabytes = sum(shard.bytes for shard in mine) / 1e6
        count = sum(shard.count for shard in mine)
        rows.append({"split": split, "shards": len(mine), "images": count, "MB": megabytes})
    print_table(rows, folder)


def _shards_verify(folder: str) -> None:
    from autosparse.data.check import verify
    from autosparse.data.tars import MANIFEST, read_manifest

    found = read_manifest(Path(folder) / MANIFEST).shards
    bad = 0
    with Progress() as progress:
        bar = progress.bar("verifying", sum(shard.bytes for shard in found) / 1e6, "MB")
        for shard, problem in verify(folder):
            bar.advance(shard.bytes / 1e6)
            if problem:
                bad += 1
                print(problem)
    if bad:
        raise RunFailed(f"{bad} of {len(found)} shards in {folder} are bad")
    print(f"{len(found)} shards in {folder}: every byte is what the manifest says")


def _shards_index(folder: str, config: IndexConfig | None = None) -> None:
    from autosparse.data.check import adopt, tars

    with Progress() as progress:
        bar = progress.bar("reading", len(tars(folder)[1]), "shards")
        found = adopt(folder, config, on_shard=bar.advance)
    _print_shards(folder, found)


SHARDS_ACTIONS: dict[str, Callable[..., None]] = {
    "pack": _shards_pack,
    "verify": _shards_verify,
    "index": _shards_index,
}
