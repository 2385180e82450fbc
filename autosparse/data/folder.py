"""A folder of images, CLASS/*.jpg, or train/CLASS, val(idation)/CLASS and test/CLASS."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from autosparse.config import DataConfig
from autosparse.data.decode import decode
from autosparse.data.source import (
    Batch,
    DataSource,
    MemorySplit,
    choose_augment,
    first_cause,
    in_memory,
    limited_places,
    stratified,
)
from autosparse.errors import UsageError

DEFAULT_SIZE = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEST_FRACTION = 0.15
DECODE_SEED = 1_000_003


def load_folder(config: DataConfig) -> DataSource:
    """Return the folder's images, held in memory if they fit, otherwise decoded as they come."""
    root = Path(config.root or "").expanduser()
    size = config.image_size or DEFAULT_SIZE
    parts, classes = _parts(root, config.validation_fraction)
    if config.train_limit is not None:
        parts["train"] = _limited(parts["train"], config.train_limit)
    needed = 3 * size * size * sum(len(part) for part in parts.values())
    augment = choose_augment(config.augment, "shift+flip")
    if needed <= config.memory_limit_gb * 1e9:
        whole = {name: _in_memory(part, size) for name, part in parts.items()}
        return in_memory(
            root.name,
            whole["train"],
            whole["test"],
            validation=whole["validation"],
            num_classes=len(classes),
            validation_fraction=config.validation_fraction,
            train_limit=None,
            augment=augment,
        )
    listing = "\n".join(f"{path.relative_to(root)} {label}" for path, label in parts["train"])
    streams: dict[str, Any] = {
        name: FolderStream(part, size, config.workers) for name, part in parts.items()
    }
    return DataSource(
        name=root.name,
        **streams,
        num_classes=len(classes),
        in_chans=3,
        image_size=size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        augment=augment,
        fingerprint=hashlib.sha256(listing.encode()).hexdigest()[:16],
    )


Sample = tuple[Path, int]


def _parts(root: Path, validation_fraction: float) -> tuple[dict[str, list[Sample]], list[str]]:
    """Split the files into train, validation and test; what has no folder is cut from train."""
    if not root.is_dir():
        raise UsageError(f"data.root {root} is not a folder")
    train_root = root / "train" if (root / "train").is_dir() else root
    train, classes = _listed(train_root)
    found: dict[str, list[Sample]] = {}
    for part, folders in (("test", ("test",)), ("validation", ("validation", "val"))):
        folder = next((root / name for name in folders if (root / name).is_dir()), None)
        if folder is not None and train_root != root:
            found[part], named = _listed(folder)
            if named != classes:
                odd = sorted(set(named) ^ set(classes))[0]
                raise UsageError(f"{folder} and {train_root} differ in class {odd!r}")
    if "test" not in found and "validation" in found:
        found["test"] = found.pop("validation")
    for part, fraction, salt in (
        ("test", TEST_FRACTION, 2),
        ("validation", validation_fraction, 0),
    ):
        if part not in found:
            rest, chosen = stratified(
                torch.tensor([label for _, label in train]), fraction, salt=salt
            )
            found[part] = [train[place] for place in chosen.tolist()]
            train = [train[place] for place in rest.tolist()]
    return {"train": train, **found}, classes


def _listed(root: Path) -> tuple[list[Sample], list[str]]:
    from torchvision.datasets import ImageFolder

    try:
        folder = ImageFolder(str(root))
    except FileNotFoundError as error:
        raise UsageError(f"{root} is no image folder: {error}") from None
    return [(Path(path), label) for path, label in folder.samples], folder.classes


def _limited(train: list[Sample], limit: int) -> list[Sample]:
    labels = torch.tensor([label for _, label in train])
    return [train[place] for place in limited_places(labels, limit).tolist()]


def _in_memory(samples: Sequence[Sample], size: int) -> MemorySplit:
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(lambda sample: decode(sample[0], size), samples))
    return MemorySplit(torch.stack(images), torch.tensor([label for _, label in samples]))


class _Decoded(Dataset):
    def __init__(self, samples: Sequence[Sample], size: int) -> None:
        self.samples, self.size = samples, size

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        path, label = self.samples[place]
        return decode(path, self.size), label


@dataclass(frozen=True)
class FolderStream:
    """A split whose images are decoded in worker processes as they are needed."""

    samples: Sequence[Sample]
    size: int
    workers: int
    device: torch.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.samples)

    def steps(self, batch_size: int, world_size: int = 1) -> int:
        return len(self) // (batch_size * world_size)

    def shuffled(
        self, batch_size: int, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed * DECODE_SEED + epoch)
        order = torch.randperm(len(self), generator=generator)
        step = batch_size * world_size
        whole = order[: self.steps(batch_size, world_size) * step].view(-1, world_size, batch_size)
        yield from self._batches(whole[:, rank].flatten().tolist(), batch_size)

    def once(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        yield from self._batches(list(range(len(self)))[rank::world_size], batch_size)

    def _batches(self, places: list[int], batch_size: int) -> Iterator[Batch]:
        loader = DataLoader(
            _Decoded(self.samples, self.size),
            batch_size=batch_size,
            sampler=places,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        try:
            for images, labels in loader:
                yield (
                    images.to(self.device, non_blocking=True),
                    labels.to(self.device, non_blocking=True),
                )
        except UsageError as error:
            raise first_cause(error) from error

    def to(self, device: torch.device) -> FolderStream:
        return replace(self, device=device)
