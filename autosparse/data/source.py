"""The interface of a data set: three splits, and how their batches are prepared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from autosparse.core.errors import UsageError
from autosparse.data import augment
from autosparse.data.config import DataConfig
from autosparse.data.normalisation import prepare
from autosparse.data.score_batches import ScoreBatches, balanced
from autosparse.data.splitting import epoch_seed

Batch = tuple[Tensor, Tensor]


class Split(Protocol):
    """One of train, validation, test."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    @property
    def labels(self) -> Tensor:
        """Every image's label [N], int64."""
        ...

    def order(self, seed: int, epoch: int) -> Tensor:
        """Return the images' numbers in an epoch's order [N]."""
        ...

    def chosen(self, parts: Sequence[list[int]]) -> Iterator[Batch]:
        """Yield the images of these numbers, a batch for each part; bad images are left out."""
        ...

    def steps(self, batch_size: int, world_size: int = 1) -> int:
        """Return how many whole batches of `batch_size` per rank an epoch has."""
        ...

    def shuffled(
        self, batch_size: int, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1,
        first: int = 0,
    ) -> Iterator[Batch]:  # fmt: skip
        """Yield whole batches in an order fixed by (seed, epoch), from step `first` on.

        As many on every rank. For the same global batch, `batch_size` times `world_size`, the
        ranks see the same samples together at a step, however many ranks there are.
        """
        ...

    def once(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield every image exactly once over all ranks; the last batch may be smaller."""
        ...

    def plain(self) -> Split:
        """Return the split without augmentation while it is decoded."""
        ...

    def to(self, device: torch.device) -> Split:
        """Return the split with its batches on `device`."""
        ...


@dataclass(frozen=True)
class DataSource:
    """A data set: three splits, and what a model and a batch need to know about it."""

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    in_chans: int
    image_size: int
    mean: tuple[float, ...]
    """Per channel, of pixels scaled to 0..1."""
    std: tuple[float, ...]
    augment: str
    """`data.augment`, with auto resolved."""
    fingerprint: str
    """16 hex digits that identify the training data: pixels and labels if held in memory, the
    manifest if shards are streamed, file names and labels (not the images) if a folder is
    streamed."""
    config: DataConfig = DataConfig()
    """The settings it was loaded with."""

    def to(self, device: torch.device) -> DataSource:
        """Return the source with its batches on `device`."""
        splits = {name: getattr(self, name).to(device) for name in ("train", "validation", "test")}
        return replace(self, **splits)

    def normalisation(self) -> dict[str, list[float]]:
        """Return mean and deviation of each channel, for cards."""
        return {"mean": list(self.mean), "std": list(self.std)}

    def prepare(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Turn uint8 images into normalised floats; augment them if a generator is given."""
        if generator is not None:
            images = augment.augmented(images, augment.parse(self.augment), generator)
        return prepare(images, self.mean, self.std)

    def skip(self, generator: torch.Generator, batch_size: int, steps: int) -> None:
        """Advance the generator by the random numbers that `prepare` draws in `steps` batches."""
        wanted = augment.parse(self.augment)
        for _ in range(steps):
            augment.draws(batch_size, self.image_size, wanted, generator)

    def augmentation(self, seed: int, epoch: int, rank: int = 0) -> torch.Generator:
        """Return the generator of an epoch's augmentation on one rank."""
        # 4099 is a prime above the number of ranks.
        return torch.Generator().manual_seed(epoch_seed(seed, epoch) * 4099 + rank)

    def score_batches(
        self, samples_per_class: int, *, seed: int = 0, batches: int = 1, batch_size: int = 128,
        rank: int = 0, world_size: int = 1,
    ) -> ScoreBatches:  # fmt: skip
        """Return balanced, normalised training batches for criteria: k images of every class.

        The images are the first of each class in the order of epoch 0 of `seed`: the first k go
        into the first batch, the next k into the second, and so on. They are known by their labels;
        only they are decoded, a batch at a time. One that cannot be decoded is left out and counted
        as in an evaluation.

        Args:
            samples_per_class: k, images of every class in a batch.
            seed: of the order.
            batches: how many balanced batches.
            batch_size: a larger balanced batch is cut into parts of this size.
            rank, world_size: return every `world_size`-th part, from number `rank` on.
        """
        for name, value in (("samples_per_class", samples_per_class), ("batches", batches),
                            ("batch_size", batch_size)):  # fmt: skip
            if value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        parts = [
            numbers[start : start + batch_size]
            for numbers in balanced(self, samples_per_class, seed, batches)
            for start in range(0, len(numbers), batch_size)
        ]
        return ScoreBatches(self, parts[rank::world_size])

    def training_batches(self, batch_size: int, seed: int) -> TrainingBatches:
        """Return the batches that training sees, augmented and normalised, epoch after epoch."""
        if not self.train.steps(batch_size):
            raise UsageError(f"batch_size {batch_size} is more than the {len(self.train)} images")
        return TrainingBatches(self, batch_size, seed)


@dataclass(frozen=True)
class TrainingBatches:
    """An endless stream of training batches, the same from the start each time it is iterated."""

    source: DataSource
    batch_size: int
    seed: int

    def __iter__(self) -> Iterator[Batch]:
        for epoch in count():
            generator = self.source.augmentation(self.seed, epoch)
            batches = self.source.train.shuffled(self.batch_size, seed=self.seed, epoch=epoch)
            for images, labels in batches:
                yield self.source.prepare(images, generator), labels
