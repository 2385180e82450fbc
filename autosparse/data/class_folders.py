"""Image folders: a folder for each class, and folders for train, validation and test."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from autosparse.core.errors import UsageError

Sample = tuple[Path, int]
"""An image file and its label."""
SPLIT_WORDS = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
"""Names of folders and shards -> the split they hold; case does not matter."""


def parts_of_folder(root: Path) -> dict[str, Path]:
    """Return split -> folder; empty where the class folders lie in `root` itself."""
    inside = [entry for entry in sorted(root.iterdir()) if not _hidden(entry) and entry.is_dir()]
    parts: dict[str, Path] = {}
    for entry in inside:
        split = SPLIT_WORDS.get(entry.name.lower())
        if split is None:
            continue
        if split in parts:
            raise UsageError(f"{root} has {parts[split].name} and {entry.name}, both for {split}: "
                             "keep one of them")  # fmt: skip
        parts[split] = entry
    if "train" in parts and (len(parts) == len(inside) or _has_folders(parts["train"])):
        return parts
    if parts and len(parts) == len(inside):
        names = " and ".join(each.name for each in parts.values())
        raise UsageError(f"{root} has {names}, but no folder train")
    return {}


def _has_folders(folder: Path) -> bool:
    return any(entry.is_dir() and not _hidden(entry) for entry in folder.iterdir())


def listed(root: Path) -> tuple[list[Sample], list[str]]:
    """Return the images below a folder's class folders, in order, and the classes.

    Hidden files and folders are passed over. A folder that is reached twice, through links, counts
    once, by its own name or else by the first link's; a warning names linked classes.
    """
    folders = _class_folders(root)
    if not folders:
        raise UsageError(f"{root} is no image folder: it holds no folder of a class")
    samples: list[Sample] = []
    others = {os.path.realpath(folder) for folder in (root, *folders)}
    for label, folder in enumerate(folders):
        images = sorted(_images(folder, others))
        if not images:
            raise UsageError(f"{root} is no image folder: its class {folder.name} has no image "
                             f"({', '.join(_endings())})")  # fmt: skip
        samples += [(Path(where, name), label) for where, name in images]
    return samples, [folder.name for folder in folders]


def _class_folders(root: Path) -> list[Path]:
    """Return class folders by name; of links to the same folder only the first."""
    visible = [entry for entry in sorted(root.iterdir()) if not _hidden(entry)]
    inside = [entry for entry in visible if entry.is_dir()]
    known = {os.path.realpath(entry): entry for entry in inside if not entry.is_symlink()}
    followed = []
    left = [f"{entry.name} (a link to nothing)" for entry in visible if not entry.exists()]
    for link in (entry for entry in inside if entry.is_symlink()):
        other = known.setdefault(os.path.realpath(link), link)
        if other is link:
            followed.append(link.name)
        else:
            left.append(f"{link.name} (the same folder as {other.name})")
    for what, names in (("followed", followed), ("left out", left)):
        if names:
            warnings.warn(f"{root}: links that are {what}: {', '.join(names)}", stacklevel=5)
    return sorted(known.values())


def _images(folder: Path, others: set[str]) -> Iterator[tuple[str, str]]:
    """Yield (folder, name) of the images below a folder; each real folder once, no `others`."""
    endings = _endings()
    seen = others - {os.path.realpath(folder)}
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            if name.lower().endswith(endings) and not name.startswith("."):
                yield where, name


def _endings() -> tuple[str, ...]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return IMG_EXTENSIONS


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")
