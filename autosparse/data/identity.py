"""The fingerprint of own data (a folder or shards): of their content, not of where they lie.

Shards are known by the hashes in their manifest; a folder by the name and SHA-256 of every file
below its class folders. A file is read once: its hash is kept in `data.cache`, by path, size and
times. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autosparse.core.errors import RunFailed, UsageError
from autosparse.core.files import read_json, sha256_of_file, write_json

if TYPE_CHECKING:
    from autosparse.data.config import DataConfig

logger = logging.getLogger(__name__)
OWN = ("folder", "shards")
"""Data sets of the user's own, known by their content; all others are known by their name."""
LARGE = 1e9
"""Bytes; a warning comes before more than that is read."""
SETTLED = 2.0
"""Seconds: a file that changed less than this before it was read may change again within the
resolution of its time stamp (2 s on FAT), so its hash is not kept."""
_looked_at: dict[tuple[str, str], str] | None = None
_by_name = False


def content(config: DataConfig) -> str | None:
    """Return 16 hex digits of own data's content, over all splits; None for named sets.

    Raises UsageError, naming `data.root`, where there are none.
    """
    if config.root is None or config.name not in OWN:
        return None
    if _by_name:
        return Path(config.root).name
    key = (config.name, str(config.root))
    if _looked_at is not None and key in _looked_at:
        return _looked_at[key]
    fingerprint = (_of_shards if config.name == "shards" else _of_folder)(config)
    if _looked_at is not None:
        _looked_at[key] = fingerprint
    return fingerprint


@contextmanager
def looked_at_once() -> Iterator[None]:
    """Compute each data set's fingerprint once while the body, a whole command, runs."""
    global _looked_at
    before = _looked_at
    _looked_at = {} if before is None else before
    try:
        yield
    finally:
        _looked_at = before


def tell_of_former(folder: Callable[[], Path], finished: str) -> None:
    """Warn if there is work of an earlier version, which knew data by the name of their folder.

    Args:
        folder: returns the folder of the work; it is called again with the former ids.
        finished: the file in it that is written last; "" if `folder` returns a file.
    """
    global _by_name
    now = folder()
    _by_name = True
    try:
        former = folder()
    finally:
        _by_name = False
    if former != now and (former / finished).is_file() and not (now / finished).is_file():
        logger.warning(
            "%s was made by an earlier version, which knew data only by the folder's name, so it "
            "may belong to other data; it is ignored, and %s is computed again.", former, now.name,
        )  # fmt: skip


def folder_root(config: DataConfig) -> Path:
    """Return the folder of images; raise UsageError unless it is there."""
    root = Path(str(config.root)).expanduser()
    if not root.is_dir():
        raise UsageError(f"data.root {config.root} is not a folder")
    return root


def _of_shards(config: DataConfig) -> str:
    from autosparse.data.remote import shards_of  # Here: `autosparse --help` stays quick.

    manifest = shards_of(config)[1]
    parts = [[each.split, each.count, each.sha256] for each in manifest.shards]
    reading = [manifest.content["reading"]] if "reading" in manifest.content else []
    return _digest([manifest.classes, parts, *reading])


def _of_folder(config: DataConfig) -> str:
    root = folder_root(config).absolute()
    name = hashlib.sha256(str(root).encode()).hexdigest()[:16]
    cached = Path(config.cache).expanduser() / "content" / f"{name}.json"
    before = _read(cached)
    try:
        facts = dict(_files(root, "", frozenset()))
    except OSError as error:
        raise UsageError(f"data.root {root} cannot be read: {error}") from None
    known = {name: before[name][-1] for name in facts if _same(before.get(name), facts[name])}
    new = [name for name in facts if name not in known]
    size = sum(facts[name][0] for name in new)
    if size > LARGE:
        logger.warning(
            "%s: reading %d files once, %.1f GB, to know them by content",
            root, len(new), size / 1e9,
        )  # fmt: skip
    begun = time.time_ns()
    with ThreadPoolExecutor() as pool:
        known |= zip(new, pool.map(lambda name: _hash(root / name), new), strict=True)
    kept = {
        name: [*facts[name], known[name]]
        for name in facts
        if max(facts[name][1:]) < begun - SETTLED * 1e9
    }
    if kept != before:
        _write(cached, kept)
    return _digest(sorted(known.items()))


def _files(folder: Path, prefix: str, above: frozenset[str]) -> Iterator[tuple[str, list[int]]]:
    """Yield (name, [bytes, times]) of all files below class folders that are not hidden.

    Links are followed, except those to a folder that contains them.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        inside = sorted(entries, key=lambda entry: entry.name)
    for entry in inside:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files(Path(entry.path), f"{prefix}{entry.name}/", above | {real})
        elif prefix:
            yield prefix + entry.name, _facts(entry)


def _facts(entry: os.DirEntry[str]) -> list[int]:
    try:
        status = entry.stat()
    except OSError:  # A dangling link; reading the images reports it.
        return [0, 0, 0]
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _same(before: Any, now: list[int]) -> bool:
    return isinstance(before, list) and before[:-1] == now


def _hash(path: Path) -> str:
    try:
        return sha256_of_file(path)
    except OSError as error:
        return f"unreadable: {error.strerror}"


def _digest(entries: Any) -> str:
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, Any]:
    try:
        cached = read_json(path)
    except UsageError:  # Missing or garbled: it is written anew.
        return {}
    return cached if isinstance(cached, dict) else {}


def _write(path: Path, hashes: dict[str, Any]) -> None:
    try:
        write_json(path, hashes)
    except RunFailed as error:
        logger.warning("data.cache: %s; all files are read again next time", error)
