"""Shards as files: the manifest, where the samples lie in each tar, and reading them.

Members of a shard are an int64 tensor [samples, 3]: offset and bytes of the image, label. They are
written by `shards pack` and `shards index`, or found by walking through the tar once and kept in
the cache.
"""

from __future__ import annotations

import os
import resource
import tarfile
import tempfile
import threading
import weakref
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from autosparse.core.errors import UsageError
from autosparse.core.files import read_json, read_tensors, sha256_of_file, write_tensors
from autosparse.data.samples import Reading, scan

MANIFEST, INDEX = "manifest.json", "index.safetensors"
FORMAT = 1
SPLITS = ("train", "validation", "test")
BLOCK = 512
"""Bytes of a tar's header, and what members are padded to (POSIX ustar)."""
MOST_OPEN = 4096
"""Most shards that a process keeps open, whatever the system allows."""
WORTH_KEEPING = 64
"""A shard of fewer samples is walked through each time: that is as quick as reading the cache."""


@dataclass(frozen=True)
class Shard:
    """One tar of the manifest."""

    name: str
    split: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds."""

    classes: list[str]
    shards: list[Shard]
    content: dict[str, Any]
    """The file as it is."""
    reading: Reading = Reading()
    """How the samples of its tars are read."""

    def only(self, names: list[str], where: str) -> Manifest:
        """Return the manifest of some of the shards; `where` says who asks for them."""
        known = {shard.name: shard for shard in self.shards}
        unknown = next((name for name in names if name not in known), None)
        if unknown is not None:
            raise UsageError(f"{where}: {MANIFEST} lists no shard {unknown}")
        wanted = set(names)
        entries = [entry for entry in self.content["shards"] if entry["name"] in wanted]
        chosen = [shard for shard in self.shards if shard.name in wanted]
        content = {**self.content, "shards": entries}
        return Manifest(self.classes, chosen, content, self.reading)


def read_manifest(path: Path | str) -> Manifest:
    """Read a manifest; raise UsageError that names it where it is not one."""
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"{path} is not a manifest of shards of format {FORMAT}")
    try:
        shards = [_shard(**entry) for entry in content["shards"]]
        classes = content["classes"]
        ways = content.get("reading", {})
        reading = Reading(str(ways.get("label", "cls")), bool(ways.get("dotted", False)),
                          tuple(map(str, classes)))  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is not a manifest of shards ({error})") from None
    if not classes or not isinstance(classes, list):
        raise UsageError(f"{path} names no classes")
    return Manifest(classes, shards, content, reading)


def _shard(name: str, split: str, count: int, bytes: int, sha256: str) -> Shard:
    if split not in SPLITS:
        raise ValueError(f"{name}: split {split!r} is none of {', '.join(SPLITS)}")
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or name.startswith("/"):
        raise ValueError(f"shard {name!r} does not lie in the manifest's folder")
    return Shard(str(name), split, int(count), int(bytes), str(sha256))


def check_size(path: Path, shard: Shard) -> None:
    """Raise UsageError unless the shard is there with its size."""
    try:
        size = path.stat().st_size
    except OSError:
        raise UsageError(f"shard {path} is in the manifest but not on disk") from None
    if size != shard.bytes:
        raise UsageError(
            f"shard {path} has {size} bytes, the manifest says {shard.bytes}: "
            "it is cut or changed; copy it again"
        )


def check_content(path: Path, shard: Shard) -> None:
    """Raise UsageError unless the shard's SHA-256 is the manifest's."""
    check_size(path, shard)
    try:
        digest = sha256_of_file(path)
    except OSError as error:
        raise UsageError(f"shard {path} cannot be read: {error.strerror or error}") from None
    if digest != shard.sha256:
        raise UsageError(
            f"shard {path} is not what the manifest says (its SHA-256 differs): it is damaged or "
            "changed; copy it again"
        )


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


def members_of(path: Path, shard: Shard, cache: Path, reading: Reading) -> Tensor:
    """Return a shard's members from the cache, or by a walk through it, which is then kept."""
    if shard.count < WORTH_KEEPING:
        return scan(path, reading)
    kept = cache / "index" / f"{shard.sha256}-{reading.digest()}.safetensors"
    with suppress(UsageError, KeyError):
        return read_tensors(kept)[0]["members"]
    members = scan(path, reading)
    with suppress(OSError):  # Without a cache the next run is only slower.
        _keep(kept, members)
    return members


def _keep(path: Path, members: Tensor) -> None:
    """Write to the cache without fsync: what a crash loses, another walk finds."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        file.write(save({"members": members}, {"card": "{}"}))
    os.replace(file.name, path)


def most_open() -> int:
    """Return how many shards a process keeps open: half of what the system lets it."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_OPEN if allowed < 0 else max(1, min(MOST_OPEN, allowed // 2))


class Files:
    """The files that were used last, kept open for reading at random, by any thread or process.

    They are closed when nothing uses this any more; a copy in another process opens its own.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._most = most_open()
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._open)

    def __reduce__(self) -> tuple[type[Files], tuple[()]]:
        return Files, ()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Return `size` bytes at `offset`; raise UsageError that names a file that is cut."""
        try:
            with self._lock:  # Else another thread could close it meanwhile.
                content = os.pread(self._descriptor(path), size, offset)
        except OSError as error:
            raise UsageError(f"shard {path} cannot be read: {error.strerror or error}") from None
        if len(content) != size:
            raise UsageError(f"shard {path} was cut while it was read; copy it again")
        return content

    def _descriptor(self, path: Path) -> int:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        while len(self._open) >= self._most:
            os.close(self._open.popitem(last=False)[1])
        self._open[path] = os.open(path, os.O_RDONLY)
        return self._open[path]


def _close_all(descriptors: OrderedDict[Path, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])
