"""The samples of a tar, grouped and named by WebDataset's rules, for reading in any order.

WebDataset's rules: only regular files; a key is the path up to the first dot of the file's name,
what follows is the extension, in lower case; names without a dot and `__meta__` members are
skipped. In addition, hidden files are skipped (macOS puts them into tars), the members of a key
need not be adjacent, and a key with the same extension twice is an error.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autosparse.core.errors import UsageError
from autosparse.data.manifest import META, Reading

IMAGES = (
    "jpg", "jpeg", "png", "webp", "jpe", "jfif", "bmp", "ppm", "pgm", "pnm", "tif", "tiff", "gif",
)  # fmt: skip
"""Extensions of images; of several in a sample the first of these is taken."""
PACKED = ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"(\xb5/\xfd", "zstd"))
MOST_LABEL = 1 << 31
"""A larger number is an id or a time, not a label."""
Parts = dict[str, tuple[int, tarfile.TarInfo]]
"""Extension -> the member's number in the tar, and the member."""


def scan(path: Path, reading: Reading | None = None) -> Tensor:
    """Walk through a tar's headers; return offset and bytes of each image, and its label [N, 3].

    Raises UsageError that names the tar, and the sample where it is one's fault.
    """
    reading = reading or Reading()
    samples: dict[str, Parts] = {}
    try:
        _check_plain(path)
        with tarfile.open(path, "r:") as tar:
            for number, member in enumerate(tar):
                _add(samples, number, member, reading, path)
            _check_end(tar)
            rows = [
                (*_image(parts, where), _label(tar, parts, reading, where))
                for key, parts in samples.items()
                if (where := f"shard {path} sample {key}") and not _is_meta(key, parts)
            ]
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UsageError(
            f"shard {path} is cut or damaged after {len(samples)} samples ({error})"
        ) from error
    return torch.tensor(rows, dtype=torch.int64).view(-1, 3)


def _check_plain(path: Path) -> None:
    with path.open("rb") as file:
        begin = file.read(6)
    kind = next((kind for magic, kind in PACKED if begin.startswith(magic)), None)
    if kind:
        raise UsageError(f"shard {path} is compressed ({kind}), so its images cannot be read at "
                         "random: unpack it to a plain .tar")  # fmt: skip


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise ReadError unless a block of zeros follows the members: tarfile stops at any other."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no member and no end of the archive at byte {tar.offset}")


def _add(
    samples: dict[str, Parts], number: int, member: tarfile.TarInfo, reading: Reading, path: Path
) -> None:
    """Add a member to its sample."""
    named = reading.key(member.name) if member.isreg() else None
    if named is None:
        return
    key, extension = named
    parts = samples.setdefault(key, {})
    if extension in parts:
        before, first = parts[extension]
        raise UsageError(
            f"shard {path} holds the key {key!r} twice: member {before} ({first.name}, at byte "
            f"{first.offset}) and member {number} ({member.name}, at byte {member.offset})"
        )
    parts[extension] = number, member


def _is_meta(key: str, parts: Parts) -> bool:
    """Whether this is metadata such as __meta__.json, not a sample."""
    return bool(META.match(key)) and not any(_last(each) in IMAGES for each in parts)


def _last(extension: str) -> str:
    return extension.rpartition(".")[2]


def _image(parts: Parts, where: str) -> tuple[int, int]:
    """Return where a sample's image begins, and how many bytes it has."""
    chosen = next((extension for extension in IMAGES if extension in parts), None)
    if chosen is None:
        several = [extension for extension in parts if _last(extension) in IMAGES]
        if len(several) > 1:
            raise UsageError(
                f"{where} has {len(several)} images ({', '.join(several[:2])} …): where keys hold "
                "dots, index the shards with --dotted true"
            )
        if not several:
            raise UsageError(f"{where} has no image (jpg, png, webp, bmp, ppm …), only "
                             f"{', '.join(parts)}")  # fmt: skip
        chosen = several[0]
    member = parts[chosen][1]
    return member.offset_data, member.size


def _label(tar: tarfile.TarFile, parts: Parts, reading: Reading, where: str) -> int:
    extension, _, entry = reading.label.partition(":")
    endings = [each for each in parts if each == extension]
    endings = endings or [each for each in parts if _last(each) == extension]
    if len(endings) != 1:
        raise UsageError(f"{where} has no {extension}, only {', '.join(parts)}{_hint(tar, parts)}")
    content = _content(tar, parts[endings[0]][1])
    if not entry:
        return _number(content, reading, f"{where}: its {extension}")
    held = _object(content)
    if entry not in held:
        raise UsageError(f"{where}: its json has no {entry!r}, only {', '.join(held)}")
    return _number(held[entry], reading, f"{where}: {entry!r} of its json")


def _hint(tar: tarfile.TarFile, parts: Parts) -> str:
    """Return advice on how to name the label, with the keys of the sample's json if it has one."""
    if "json" not in parts:
        return "; name what holds the label by --label when the shards are indexed"
    keys = ", ".join(_object(_content(tar, parts["json"][1])))
    return f"; index the shards with --label json:KEY, its keys are {keys}"


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = tar.extractfile(member)
    assert file is not None
    return file.read().decode("utf-8", "replace")


def _object(content: str) -> dict[str, Any]:
    try:
        held = json.loads(content)
    except json.JSONDecodeError:
        return {}
    return held if isinstance(held, dict) else {}


def _number(value: Any, reading: Reading, where: str) -> int:
    """Return a label that is a number, also as text, or the name of a class."""
    text = str(value).strip()
    if text in reading.names and not text.isdigit():
        return reading.names.index(text)
    try:
        number = int(float(text)) if isinstance(value, float) and value.is_integer() else int(text)
    except ValueError:
        raise UsageError(
            f"{where} is {text[:40]!r}, which is no number and none of the classes' names"
        ) from None
    if not 0 <= number < MOST_LABEL:
        raise UsageError(f"{where} says {number}, which is no label")
    return number
