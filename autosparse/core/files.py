"""Files that are whole or absent: written to a temporary name, synced, renamed.

A place is a local path or the URL of anything that fsspec knows (s3://, gs://, memory:// …); there
an upload takes effect when it is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from autosparse.core.errors import RunFailed, UsageError

if TYPE_CHECKING:
    from torch import Tensor


def place(path: str | Path) -> Path:
    """Return a Path for a local path, `~` replaced, and a UPath, which behaves alike, for a URL."""
    if isinstance(path, Path) or "://" not in str(path):
        path = Path(path)
        return path.expanduser() if path.parts[:1] == ("~",) else path
    from upath import UPath

    try:
        remote = UPath(path)
        _ = remote.fs
    except (ValueError, ImportError) as error:
        raise UsageError(f"cannot open {path}: {error}") from None
    return Path(remote.path) if isinstance(remote, os.PathLike) else cast(Path, remote)


def is_local(path: str | Path) -> bool:
    """Return whether a place lies in the local file system."""
    return isinstance(path, str | os.PathLike) and isinstance(place(cast(Path, path)), Path)


def local_place(path: str | Path) -> Path:
    """Return a Path; raise UsageError for a URL, where only a local path will do."""
    if not is_local(path):
        raise UsageError(f"{path} is a URL; a local folder is needed")
    return place(path)


def remove_tree(folder: Path) -> None:
    """Remove a folder and everything in it; it may be gone already."""
    if is_local(folder):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder.fs.rm(folder.path, recursive=True)  # type: ignore[attr-defined]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it and rename it to `path`.

    After a failure, or a kill at any moment, `path` is as it was before.
    Raises RunFailed with one line when the disk is full or not writable.
    """
    path = place(path)
    if not is_local(path):
        with _uploading(path) as temporary:
            yield temporary
        return
    # Process ids repeat from host to host and from container to container.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise _disk_error(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raise RunFailed unless a file or folder can be made (or written) at a local path."""
    path = place(path)
    if not is_local(path):
        return
    there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    if there != path.absolute() and not there.is_dir():
        raise RunFailed(f"cannot write {path}: {there} is not a folder")
    if not os.access(there, os.W_OK):
        raise RunFailed(f"cannot write {path}: {there} may not be written to")


def check_folder(path: str | Path) -> None:
    """Raise RunFailed unless a folder can be made (or written to) at a local path."""
    check_writable(path)
    if is_local(path) and place(path).is_file():
        raise RunFailed(f"cannot write into {path}: it is a file, not a folder")


def check_file(path: str | Path) -> None:
    """Raise RunFailed unless a file can be made (or replaced) at a local path."""
    if not is_local(path):
        return
    if place(path).is_dir():
        raise RunFailed(f"cannot write {path}: it is a folder; name a file")
    check_folder(place(path).parent)


@contextmanager
def _uploading(path: Path) -> Iterator[Path]:
    where = path
    try:
        with tempfile.TemporaryDirectory() as folder:
            temporary = where = Path(folder) / path.name
            yield temporary
            content = temporary.read_bytes()
            where = path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    except OSError as error:
        raise _disk_error(error, where) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _disk_error(error: OSError, path: Path) -> RunFailed:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunFailed(f"no room on disk to write {path}; free some and start again")
    return RunFailed(f"cannot write {path}: {error.strerror or error}")


def set_aside(path: Path, what: str, problem: Exception) -> UsageError:
    """Rename a damaged file to NAME.damaged; return the error that says so and what to do."""
    aside = path.with_name(f"{path.name}.damaged")
    try:
        path.rename(aside)
    except OSError as error:
        return UsageError(f"{problem}; remove {path} and start again ({error})")
    return UsageError(f"{problem}; set aside as {aside.name}, start again to {what}")


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`, atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, content: str) -> None:
    """Write `content` to `path` as UTF-8, atomically."""
    write_bytes(path, content.encode())


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` to `path` as indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON; raises UsageError that names the file when it is missing or garbled."""
    try:
        return json.loads(place(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no such file: {path}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid JSON ({error})") from None


def write_tensors(path: str | Path, tensors: dict[str, Tensor], card: dict[str, Any]) -> None:
    """Write tensors and their card as one safetensors file, atomically.

    The same content gives the same bytes: the card is the only entry of the header's metadata.
    """
    from safetensors.torch import save

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(whole, {"card": json.dumps(card, sort_keys=True, allow_nan=False)}))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote; raises UsageError that names a missing or damaged file."""
    card = read_card(path)
    from safetensors.torch import load, load_file

    with _reading(path):
        if not is_local(path):
            return load(place(path).read_bytes()), card
        return load_file(place(path)), card


def read_card(path: str | Path) -> dict[str, Any]:
    """Read only the card in the header of a safetensors file."""
    from safetensors import safe_open

    with _reading(path):
        if is_local(path):
            with safe_open(place(path), framework="pt") as handle:
                metadata = handle.metadata() or {}
        else:
            metadata = _remote_metadata(place(path))
    if "card" not in metadata:
        raise UsageError(f"{path} holds no card: it was not written by autosparse")
    try:
        card = json.loads(metadata["card"])
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: the card in its header is damaged ({error})") from None
    if not isinstance(card, dict):
        raise UsageError(f"{path}: the card in its header is damaged")
    return card


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Raise UsageError that names the file when it is missing, damaged or cannot be read.

    Files of a run that is finishing may be removed while they are read; torch, which maps files
    into memory, raises a RuntimeError then.
    """
    from safetensors import SafetensorError

    try:
        if not place(path).is_file():
            raise FileNotFoundError
        yield
    except (SafetensorError, ValueError) as error:
        raise UsageError(f"{path} is damaged or no safetensors file ({error})") from None
    except FileNotFoundError:
        raise UsageError(f"no such file: {path}") from None
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{path} cannot be read ({error})") from None


def _remote_metadata(path: Path) -> dict[str, str]:
    """Read a safetensors header only: its length in 8 bytes, then JSON (at most 100 MB)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, 1 << 27)))
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise ValueError("its header is garbled")
    return metadata


def require(card: dict[str, Any], keys: tuple[str, ...], path: str | Path) -> None:
    """Raise UsageError that names the file and the first of `keys` that its card lacks."""
    missing = next((key for key in keys if key not in card), None)
    if missing is not None:
        raise UsageError(f"{path}: its card has no {missing!r}; the file is damaged")


def sha256_of_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with place(path).open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
