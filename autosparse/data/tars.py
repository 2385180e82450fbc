"""Shards as files: their manifest, where the samples lie in a tar, and reading them at random.

Members of a shard are an int64 tensor [samples, 3]: offset and bytes of the image, label. They are
written by `shards pack`, or found by walking through the tar once and kept in the cache.
"""

from __future__ import annotations

import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from autosparse.errors import RunFailed, UsageError
from autosparse.files import read_json, read_tensors, replacing, sha256_of_file, write_tensors

MANIFEST, INDEX = "manifest.json", "index.safetensors"
FORMAT = 1
SPLITS = ("train", "validation", "test")
IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
BLOCK = 512
OPEN_FILES = 128


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


def read_manifest(path: Path | str) -> Manifest:
    """Read a manifest; raise UsageError that names it where it is not one."""
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"{path} is not a manifest of shards of format {FORMAT}")
    try:
        shards = [_shard(**entry) for entry in content["shards"]]
        classes = content["classes"]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is not a manifest of shards ({error})") from None
    if not classes or not isinstance(classes, list):
        raise UsageError(f"{path} names no classes")
    return Manifest(classes, shards, content)


def _shard(name: str, split: str, count: int, bytes: int, sha256: str) -> Shard:
    if split not in SPLITS:
        raise ValueError(f"{name}: split {split!r} is none of {', '.join(SPLITS)}")
    if Path(name).name != name:
        raise ValueError(f"shard {name!r} does not lie beside the manifest")
    return Shard(str(name), split, int(count), int(bytes), str(sha256))


def check_size(path: Path, shard: Shard) -> None:
    """Raise UsageError unless the shard is there with its size."""
    try:
        found = path.stat().st_size
    except OSError:
        raise UsageError(f"shard {path} is in the manifest but not on disk") from None
    if found != shard.bytes:
        raise UsageError(
            f"shard {path} has {found} bytes, the manifest says {shard.bytes}: "
            "it is cut or changed; copy it again"
        )


def check_content(path: Path, shard: Shard) -> None:
    """Raise UsageError unless the shard's SHA-256 is the manifest's."""
    check_size(path, shard)
    try:
        found = sha256_of_file(path)
    except OSError as error:
        raise UsageError(f"shard {path} cannot be read: {error.strerror or error}") from None
    if found != shard.sha256:
        raise UsageError(
            f"shard {path} is not what the manifest says (its SHA-256 differs): it is damaged or "
            "changed; copy it again"
        )


def scan(path: Path) -> Tensor:
    """Walk through a tar's headers and return its members; raise UsageError that names it."""
    found: list[tuple[int, int, int]] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for key, parts in _samples(tar):
                found.append(_member(tar, parts, f"shard {path} sample {key}"))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UsageError(
            f"shard {path} is cut or damaged after {len(found)} samples ({error})"
        ) from error
    return torch.tensor(found, dtype=torch.int64).view(-1, 3)


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yield members of the same key together, by extension, as WebDataset does."""
    key, parts = None, {}
    for member in tar:
        if not member.isfile():
            continue
        folder, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        if (folder, stem) != key and parts:
            yield "/".join(filter(None, key or ())), parts
            parts = {}
        key = (folder, stem)
        parts[extension.lower()] = member
    if parts:
        yield "/".join(filter(None, key or ())), parts


def _member(
    tar: tarfile.TarFile, parts: dict[str, tarfile.TarInfo], where: str
) -> tuple[int, int, int]:
    image = next((parts[key] for key in IMAGE_KEYS if key in parts), None)
    if image is None or "cls" not in parts:
        raise UsageError(f"{where} has no image (jpg, png, webp) or no cls")
    label = tar.extractfile(parts["cls"])
    assert label is not None
    try:
        return image.offset_data, image.size, int(label.read())
    except ValueError:
        raise UsageError(f"{where}: its cls is no number") from None


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
    return name.partition(".")[0]


def write_index(path: Path, members: dict[str, Tensor], shards: list[Shard]) -> None:
    """Write the members of many shards to one file."""
    write_tensors(path, members, {"sha256": {shard.name: shard.sha256 for shard in shards}})


def read_index(path: Path, shards: list[Shard]) -> dict[str, Tensor]:
    """Return what an index says of `shards`; nothing of one that has changed since, or is new."""
    if not path.is_file():
        return {}
    members, card = read_tensors(path)
    hashes = card.get("sha256", {})
    return {
        shard.name: members[shard.name]
        for shard in shards
        if hashes.get(shard.name) == shard.sha256 and shard.name in members
    }


def members_of(path: Path, shard: Shard, cache: Path) -> Tensor:
    """Return a shard's members from the cache, or by a walk through it, which is then kept."""
    kept = cache / "index" / f"{shard.sha256}.safetensors"
    with suppress(UsageError, KeyError):
        return read_tensors(kept)[0]["members"]
    members = scan(path)
    with suppress(RunFailed):  # A cache that cannot be written only costs time.
        write_tensors(kept, {"members": members}, {"shard": shard.name})
    return members


class Files:
    """Open files, the last used ones, for reading at random by any process."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, BinaryIO] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": OrderedDict()}

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Return `size` bytes at `offset`; raise UsageError that names a file that is cut."""
        try:
            content = os.pread(self._handle(path).fileno(), size, offset)
        except OSError as error:
            raise UsageError(f"shard {path} cannot be read: {error.strerror or error}") from None
        if len(content) != size:
            raise UsageError(f"shard {path} was cut while it was read; copy it again")
        return content

    def _handle(self, path: Path) -> BinaryIO:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        while len(self._open) >= OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        self._open[path] = path.open("rb", buffering=0)
        return self._open[path]


def copy_atomically(content: BinaryIO, path: Path) -> None:
    """Write what a stream gives to `path`; nothing is there before it is whole."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        while block := content.read(1 << 20):
            file.write(block)
