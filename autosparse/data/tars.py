"""Shards as files: where the samples lie in each tar, and reading them.

The members of a shard are an int64 tensor [samples, 3]: offset and bytes of the image, label. The
index that `shards pack` and `shards index` write holds those of all shards; where it lacks a shard,
its tar is walked through.
"""

from __future__ import annotations

import os
import resource
import tarfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from autosparse.core.errors import UsageError
from autosparse.core.files import read_tensors, write_tensors
from autosparse.data.manifest import Reading, Shard

INDEX = "index.safetensors"
BLOCK = 512
"""Bytes of a tar's header, and what members are padded to (POSIX ustar)."""
MOST_OPEN = 4096
"""Most shards that a process keeps open, whatever the system allows."""


def check_members(members: Tensor, path: Path, shard: Shard, classes: int) -> None:
    """Raise UsageError unless there are as many as in the manifest, whole, and of known classes."""
    if len(members) != shard.count:
        raise UsageError(
            f"shard {path} has {len(members)} samples, the manifest says {shard.count}: "
            "one of them is damaged"
        )
    offsets, sizes, labels = members.unbind(1)
    if ((offsets < BLOCK) | (sizes < 0) | (offsets + sizes > shard.bytes)).any():
        raise UsageError(f"shard {path}: a sample reaches beyond its end; it is cut or damaged")
    wrong = ((labels < 0) | (labels >= classes)).nonzero().flatten().tolist()
    if wrong:
        where = f"shard {path} sample {key_of(path, int(offsets[wrong[0]]))}"
        label = int(labels[wrong[0]])
        raise UsageError(f"{where}: label {label} is none of the {classes} classes")


def key_of(path: Path, offset: int) -> str:
    """Return the key of the sample whose image begins at `offset`, from the header before it."""
    try:
        with path.open("rb") as file:
            file.seek(offset - BLOCK)
            name = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "replace").name
    except (OSError, ValueError, tarfile.TarError):
        return f"at byte {offset}"
    named = Reading().key(name)
    return named[0] if named else name


def write_index(path: Path, members: dict[str, Tensor], shards: list[Shard]) -> None:
    """Write the members of many shards to one file."""
    write_tensors(path, members, {"sha256": {shard.name: shard.sha256 for shard in shards}})


def read_index(path: Path, shards: list[Shard]) -> dict[str, Tensor]:
    """Return the members of `shards` in an index, except of shards that are new or have changed."""
    if not path.is_file():
        return {}
    members, card = read_tensors(path)
    hashes = card.get("sha256", {})
    return {
        shard.name: members[shard.name]
        for shard in shards
        if hashes.get(shard.name) == shard.sha256 and shard.name in members
    }


class _Descriptor:
    """A file that is open for reading, until nothing refers to it any more."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.number)


class Files:
    """The files that were used last, kept open for reading at random, by any thread or process.

    At most half as many as the system lets a process open. A copy in another process opens its own.
    """

    def __init__(self) -> None:
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = MOST_OPEN if allowed < 0 else max(1, min(MOST_OPEN, allowed // 2))
        self._opened = lru_cache(most)(lambda path: _Descriptor(os.open(path, os.O_RDONLY)))

    def __reduce__(self) -> tuple[type[Files], tuple[()]]:
        return Files, ()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Return `size` bytes at `offset`; raise UsageError that names a file that is cut."""
        try:
            file = self._opened(path)
            content = os.pread(file.number, size, offset)
        except OSError as error:
            raise UsageError(f"shard {path} cannot be read: {error.strerror or error}") from None
        if len(content) != size:
            raise UsageError(f"shard {path} was cut while it was read; copy it again")
        return content
