"""The manifest of a folder of shards: which tars there are, and what each should be.

Nothing here imports torch: a run's id needs the manifest, and is wanted quickly.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from autosparse.core.errors import UsageError
from autosparse.core.files import read_json, sha256_of_file

MANIFEST = "manifest.json"
FORMAT = 1
SPLITS = ("train", "validation", "test")
META = re.compile(r"__[^/]*__($|/)")
"""Members that WebDataset skips."""
NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
DOTTED_NAME = re.compile(r"((?:.*/)?[^./][^/]*)\.([^./]*)", re.DOTALL)


@dataclass(frozen=True)
class Reading:
    """How samples are read.

    Attributes:
        label: extension of the label, or json:KEY.
        dotted: whether extensions begin at a name's last dot.
        names: classes, for labels that are names.
    """

    label: str = "cls"
    dotted: bool = False
    names: tuple[str, ...] = ()

    def key(self, name: str) -> tuple[str, str] | None:
        """Return a member's key and extension; None if it does not belong to a sample."""
        matched = (DOTTED_NAME if self.dotted else NAME).fullmatch(name)
        if matched is None or META.match(name):
            return None
        return matched[1], matched[2].lower()


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
    """The classes and shards of a folder."""

    classes: list[str]
    shards: list[Shard]
    content: dict[str, Any]
    """The file as it is."""
    reading: Reading = Reading()
    """How the samples of its tars are read."""

    def only(self, names: list[str], where: str) -> Manifest:
        """Return the manifest of some of the shards; `where` begins the error message."""
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
        given = content.get("reading", {})
        reading = Reading(str(given.get("label", "cls")), bool(given.get("dotted", False)),
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
    if not str(sha256).isalnum():  # The cache's files are named by it.
        raise ValueError(f"{name}: {sha256!r} is no SHA-256")
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
