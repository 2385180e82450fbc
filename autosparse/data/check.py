"""Folders of shards: check every byte, and index tars that others wrote."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from autosparse.core.errors import UsageError, unknown
from autosparse.core.files import sha256_of_file, write_json
from autosparse.core.ranges import check_ranges
from autosparse.data.class_folders import SPLIT_WORDS
from autosparse.data.config import IndexConfig
from autosparse.data.manifest import (
    FORMAT,
    MANIFEST,
    SPLITS,
    Manifest,
    Reading,
    Shard,
    check_content,
    read_manifest,
)
from autosparse.data.remote import expanded
from autosparse.data.samples import scan
from autosparse.data.splitting import warn_of_empty
from autosparse.data.tars import INDEX, check_members, key_of, read_index, write_index

THREADS = 4
"""Shards that are hashed at a time."""
MOST_GAP = 0.5
"""If the largest label gives the number of classes, at most half of them may have no image: one
wrong label would otherwise make a network of very many outputs."""
COMPRESSED = re.compile(r"(.*)\.(tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz)", re.IGNORECASE)


def verify(root: str | Path) -> Iterator[tuple[Shard, str | None]]:
    """Yield every shard of the manifest with its problem, or None."""
    root = Path(root)
    manifest = read_manifest(root / MANIFEST)
    index = read_index(root / INDEX, manifest.shards)

    def problem(shard: Shard) -> str | None:
        try:
            _check(root / shard.name, shard, manifest, index.get(shard.name))
        except UsageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        yield from zip(manifest.shards, pool.map(problem, manifest.shards), strict=True)


def _check(path: Path, shard: Shard, manifest: Manifest, indexed: Tensor | None) -> None:
    check_content(path, shard)
    members = scan(path, manifest.reading)
    check_members(members, path, shard, len(manifest.classes))
    if indexed is not None and not torch.equal(indexed, members):
        raise UsageError(f"shard {path} is whole, but {INDEX} says otherwise: remove {INDEX}")


def adopt(
    root: str | Path,
    config: IndexConfig | None = None,
    on_shard: Callable[[], None] | None = None,
) -> list[Shard]:
    """Write manifest and index for tars in a folder, or for those of a pattern in braces.

    A tar's split is the word train, val or test in its name, or in the name of its folder. Without
    test tars, the validation tars become the test split; without validation tars, some of the
    training tars become the validation split.
    """
    config = config or IndexConfig()
    check_ranges(config, {"validation_fraction": "at least 0 and below 1"})
    names, listed = _classes(config), tars(root)
    folder = listed[0]
    if (folder / MANIFEST).exists():
        raise UsageError(f"{folder / MANIFEST} is there already: remove it to write it anew")
    splits = {name: _split(name, folder, config.split) for name in listed[1]}
    reading = Reading(config.label, config.dotted, tuple(names or ()))
    shards, members = [], {}
    for name, split in splits.items():
        members[name] = scan(folder / name, reading)
        shards.append(_described(folder, name, split, len(members[name])))
        if on_shard:
            on_shard()
    names = names or _counted(members, folder)
    for shard in shards:
        check_members(members[shard.name], folder / shard.name, shard, len(names))
    warn_of_empty(_labels(members), names, str(folder))
    shards = _with_all_splits(shards, config.validation_fraction)
    content = {"format": FORMAT, "classes": names, "shards": [asdict(shard) for shard in shards]}
    if reading != replace(Reading(), names=reading.names):
        content["reading"] = {"label": reading.label, "dotted": reading.dotted}
    write_index(folder / INDEX, members, shards)
    write_json(folder / MANIFEST, content)
    return shards


def tars(root: str | Path) -> tuple[Path, list[str]]:
    """Return a folder and the names of the tars in it, or of those that a pattern means."""
    where, names = expanded(str(root))
    folder = Path(where).expanduser()
    if names is None:
        paths = [path.relative_to(folder) for path in sorted(folder.rglob("*"))]
        plain = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
        names = [str(path) for path in plain if path.suffix.lower() == ".tar"]
        for path in map(str, plain):
            packed = COMPRESSED.fullmatch(path)
            if packed and f"{packed[1]}.tar" not in names:
                raise UsageError(f"{folder / path} is compressed, so its images cannot be read at "
                                 "random: unpack it to a plain .tar")  # fmt: skip
    if not names:
        raise UsageError(f"{root} holds no tar")
    return folder, names


def _split(name: str, folder: Path, default: str | None) -> str:
    """Return the split named by a tar's name, or else by the innermost folder that names one."""
    if default is not None and default not in SPLITS:
        raise unknown("split", default, SPLITS)
    for part in reversed(PurePosixPath(name).parts):
        words = re.findall("[a-z]+", part.lower())
        splits = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
        if len(splits) > 1:
            raise UsageError(f"shard {folder / name}: its name says {' and '.join(sorted(splits))}")
        if splits:
            return splits.pop()
    if default is None:
        raise UsageError(
            f"shard {folder / name}: its name says neither train, val nor test as a word; --split "
            "says which it is"
        )
    return default


def _described(folder: Path, name: str, split: str, count: int) -> Shard:
    path = folder / name
    if not count:
        raise UsageError(f"shard {path} holds no sample")
    return Shard(name, split, count, path.stat().st_size, sha256_of_file(path))


def _classes(config: IndexConfig) -> list[str] | None:
    """Return the classes that are given, by their number or as a file of their names."""
    if config.classes is None:
        return None
    if str(config.classes).isdigit():
        return [str(label) for label in range(int(config.classes))]
    try:
        lines = Path(config.classes).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"classes {config.classes} is no number and no file of names: "
                         f"{error}") from None  # fmt: skip
    return [line.strip() for line in lines if line.strip()]


def _labels(members: dict[str, Tensor]) -> Tensor:
    return torch.cat([rows[:, 2] for rows in members.values()])


def _counted(members: dict[str, Tensor], folder: Path) -> list[str]:
    """Return the classes 0 to the largest label; raise UsageError if too many have no image."""
    labels = _labels(members)
    count, present = int(labels.max()) + 1, len(labels.unique())
    if count - present > max(1, MOST_GAP * count):
        where = next(name for name, rows in members.items() if int(rows[:, 2].max()) == count - 1)
        row = members[where][members[where][:, 2].argmax()]
        key = key_of(folder / where, int(row[0]))
        raise UsageError(
            f"shard {folder / where} sample {key}: label {count - 1} would make {count} classes, "
            f"of which {count - present} have no image; say how many there are by --classes NUMBER "
            "or --classes FILE"
        )
    return [str(label) for label in range(count)]


def _with_all_splits(shards: list[Shard], fraction: float) -> list[Shard]:
    """Make test shards of validation's, then validation shards of train's, where there are none."""
    if not any(shard.split == "test" for shard in shards):
        shards = [replace(each, split="test") if each.split == "validation" else each
                  for each in shards]  # fmt: skip
    train = [shard for shard in shards if shard.split == "train"]
    held = set(train[-math.ceil(fraction * len(train)) :])
    if any(shard.split == "validation" for shard in shards) or len(held) == len(train):
        return shards
    return [replace(shard, split="validation") if shard in held else shard for shard in shards]
