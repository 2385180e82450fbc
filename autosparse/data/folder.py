"""A folder of images, CLASS/*.jpg, or train/CLASS, val(idation)/CLASS and test/CLASS."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from autosparse.core.errors import UsageError
from autosparse.data.class_folders import Sample, listed, parts_of_folder
from autosparse.data.config import DataConfig
from autosparse.data.decode import read_image
from autosparse.data.identity import folder_root
from autosparse.data.source import DataSource
from autosparse.data.splitting import epoch_order, limited_places, stratified
from autosparse.data.stream import own_data

TEST_FRACTION = 0.15
"""Share of images that becomes the test split where there is none, as by default for validation."""


def load_folder(config: DataConfig) -> DataSource:
    """Return the folder's images, held in memory if they fit, otherwise decoded as they come."""
    root = folder_root(config)
    parts, classes = parts_of(root, config.validation_fraction)
    if config.train_limit is not None:
        labels = torch.tensor([label for _, label in parts["train"]])
        places = limited_places(labels, config.train_limit).tolist()
        parts["train"] = [parts["train"][place] for place in places]

    def fingerprint() -> str:
        listing = "\n".join(f"{path.relative_to(root)} {label}" for path, label in parts["train"])
        return hashlib.sha256(listing.encode()).hexdigest()[:16]

    samples = {split: FolderSamples(part) for split, part in parts.items()}
    name = root.name or root.resolve().name
    limited = replace(config, train_limit=None)  # By the files, above.
    return own_data(name, samples, len(classes), limited, fingerprint)


def parts_of(root: Path, validation_fraction: float) -> tuple[dict[str, list[Sample]], list[str]]:
    """Split the files in three; validation and test without a folder are cut from train."""
    if not root.is_dir():
        raise UsageError(f"data.root {root} is not a folder")
    folders = parts_of_folder(root)
    train_root = folders.pop("train", root)
    train, classes = listed(train_root)
    parts: dict[str, list[Sample]] = {}
    for part, folder in folders.items():
        parts[part], named = listed(folder)
        if named != classes:
            odd = sorted(set(named) ^ set(classes))[0]
            raise UsageError(f"{folder} and {train_root} differ in class {odd!r}")
    if "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")
    for part, fraction, salt in (
        ("test", TEST_FRACTION, 2),
        ("validation", validation_fraction, 0),
    ):
        if part not in parts:
            rest, chosen = stratified(
                torch.tensor([label for _, label in train]), fraction, salt=salt
            )
            parts[part] = [train[place] for place in chosen.tolist()]
            train = [train[place] for place in rest.tolist()]
    return {"train": train, **parts}, classes


class FolderSamples:
    """The files of one split, read as they are needed."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def labels(self) -> Tensor:
        """Return every file's label [N]."""
        return torch.tensor([label for _, label in self.samples], dtype=torch.int64)

    def order(self, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the files in an epoch's order, the same as in memory; all in one lane."""
        order = epoch_order(len(self), seed, epoch)
        return order, torch.zeros_like(order)

    def share(self, rank: int, world_size: int) -> list[int]:
        """Return a rank's part of all files."""
        return list(range(rank, len(self), world_size))

    def prepare(self, numbers: list[int]) -> None:
        """Nothing is checked before a file is read."""

    def read(self, number: int) -> tuple[bytes, int]:
        """Return a file's content and its label."""
        path, label = self.samples[number]
        return read_image(path), label

    def name(self, number: int) -> str:
        """Return the path of a file."""
        return str(self.samples[number][0])

    def neighbour(self, number: int) -> int:
        """Return the next file; after the last one the first."""
        return (number + 1) % len(self)
