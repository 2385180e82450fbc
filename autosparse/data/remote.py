"""Where shards are: in a local folder, or at a URL, and each is fetched once into a cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from filelock import FileLock

from autosparse.core.errors import RunFailed, UsageError, UserError
from autosparse.core.files import check_writable, replacing
from autosparse.data.manifest import (
    MANIFEST,
    Manifest,
    Shard,
    check_content,
    check_size,
    read_manifest,
)

if TYPE_CHECKING:
    from autosparse.data.config import DataConfig

SCHEMES = ("http", "https", "gs", "s3")


class Folder:
    """A local folder of shards."""

    def __init__(self, root: Path) -> None:
        self.root, self.name = str(root), root.name or root.resolve().name

    def file(self, name: str, *, needed: bool = True) -> Path:
        """Return where a small file is; one that is not needed may not be there."""
        return Path(self.root) / name

    def path(self, shard: Shard) -> Path:
        """Return where a shard is, once it is fetched."""
        return Path(self.root) / shard.name

    def check(self, shard: Shard) -> None:
        """Check at the start that a shard is there with its size."""
        check_size(self.path(shard), shard)

    def fetch(self, shard: Shard) -> None:
        """Check a shard's content, when it is first read in a run."""
        check_content(self.path(shard), shard)


class RemoteFolder(Folder):
    """Shards at a URL; the cache knows them by their SHA-256, so copies elsewhere share it."""

    def __init__(self, root: str, cache: Path) -> None:
        self.root, self.cache = root.rstrip("/"), cache
        self.name = self.root.rpartition("/")[2]
        self._files: dict[str, Path] = {}

    def file(self, name: str, *, needed: bool = True) -> Path:
        """Fetch a small file, once per process; one that is not needed may be missing."""
        if name not in self._files:
            key = hashlib.sha256(self.root.encode()).hexdigest()[:16]
            path = self.cache / "remote" / key / name
            with _locked(path):
                try:
                    self._fetch(name, path)
                except UsageError:
                    if needed:
                        raise
            self._files[name] = path
        return self._files[name]

    def path(self, shard: Shard) -> Path:
        return self.cache / "shards" / f"{shard.sha256}.tar"

    def check(self, shard: Shard) -> None:
        """Do nothing: a shard is checked when it is fetched."""

    def fetch(self, shard: Shard) -> None:
        """Fetch a shard unless the cache holds it whole; raise UsageError that names it."""
        path = self.path(shard)
        with _locked(path):
            if path.is_file():
                try:
                    return check_content(path, shard)
                except UsageError:
                    path.unlink()
            self._fetch(shard.name, path)
            try:
                check_content(path, shard)
            except UsageError as error:
                path.unlink(missing_ok=True)
                problem = str(error).replace(str(path), f"{self.root}/{shard.name}")
                raise UsageError(problem) from None

    def _fetch(self, name: str, path: Path) -> None:
        import fsspec

        url = f"{self.root}/{name}"
        try:
            with (
                fsspec.open(url, "rb") as content,
                replacing(path) as temporary,
                temporary.open("wb") as file,
            ):
                file.writelines(_blocks(cast(BinaryIO, content), url))
        except UserError:
            raise
        except FileNotFoundError:
            raise UsageError(f"{url} is not there, or its server cannot be reached") from None
        except Exception as error:  # Each file system of fsspec raises errors of its own.
            raise _unfetched(url, error) from None


def _blocks(content: BinaryIO, url: str) -> Iterator[bytes]:
    """Yield a remote file block by block; an error of the network is not one of the disk."""
    try:
        while block := content.read(1 << 20):
            yield block
    except Exception as error:
        raise _unfetched(url, error) from None


def _unfetched(url: str, error: Exception) -> UsageError:
    return UsageError(f"cannot fetch {url}: {' '.join(str(error).split())}")


def _locked(path: Path) -> FileLock:
    """Return the lock that keeps other processes of this machine from fetching the same file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path.parent)
    except (OSError, RunFailed) as error:
        raise UsageError(f"data.cache cannot be written: {error}") from None
    return FileLock(path.with_name(f".{path.name}.lock"))


def expanded(root: str) -> tuple[str, list[str] | None]:
    """Split a tar, or a brace pattern of tars, into its folder and the names in it.

    For a folder the names are None, which stands for all shards in its manifest.
    """
    from braceexpand import UnbalancedBracesError, braceexpand

    local = "://" not in root
    if not (".tar" in root.lower() or "{" in root) or (local and Path(root).expanduser().is_dir()):
        return root, None
    try:
        tars = list(braceexpand(root))
    except (UnbalancedBracesError, ValueError) as error:
        raise UsageError(f"{root} is no pattern of shards: {error}") from None
    head, slash, _ = root.partition("{")[0].rpartition("/")
    return head or slash or ".", [tar.removeprefix(head + slash) for tar in tars]


def shards_of(config: DataConfig) -> tuple[Folder, Manifest]:
    """Return the folder of `data.root`, and the manifest of the shards that it names."""
    folder = folder_of(config)
    path = folder.file(MANIFEST)
    if not path.is_file():
        raise UsageError(f"{path} is not there: `autosparse shards index {folder.root}` writes it")
    manifest = read_manifest(path)
    names = expanded(str(config.root))[1]
    return folder, manifest if names is None else manifest.only(names, f"data.root {config.root}")


def folder_of(config: DataConfig) -> Folder:
    """Return the folder that `data.root` names.

    Raises UsageError where a local one is not there, and for a URL unless it may be read.
    """
    if str(config.root).startswith("pipe:"):
        raise UsageError(f"data.root {config.root}: commands are not run")
    root = expanded(str(config.root))[0]
    if "://" not in root:
        folder = Path(root).expanduser()
        if not folder.is_dir():
            raise UsageError(f"data.root {root} is not a folder")
        return Folder(folder)
    scheme = root.partition("://")[0]
    if scheme not in SCHEMES:
        raise UsageError(f"data.root {root}: only {', '.join(SCHEMES)} and local folders are read")
    if not config.allow_remote:
        raise UsageError(
            f"data.root {root} is a URL: set data.allow_remote to true to fetch shards from there"
            f" ({MANIFEST} says which)"
        )
    return RemoteFolder(root, Path(config.cache).expanduser())
