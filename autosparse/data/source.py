"""Data sources: three splits, in memory or streamed, and augmentation of whole batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from autosparse.core.errors import UsageError
from autosparse.data.augment import parse, rand_augmented_batch
from autosparse.data.config import DataConfig
from autosparse.data.normalisation import Constants
from autosparse.data.score_batches import ScoreBatches, score_batches

Batch = tuple[Tensor, Tensor]
SPLIT_SEED = 20240827
"""Fixes every split; not an option, so that a test image never becomes a training image."""
FLIP_SALT = 500_009
"""Makes the seed of the first flips differ from those of the epochs' orders."""


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
class MemorySplit:
    """A split held whole as uint8 images [N, C, H, W] and labels [N], on any device."""

    images: Tensor
    labels: Tensor
    lanes: Callable[[int, int], tuple[Tensor, Tensor]] | None = None
    """(seed, epoch) -> order and lanes [N], where it is not that of `epoch_order`."""
    alternating: bool = False
    """Whether `shuffled` mirrors images; see `mirrored`."""

    def __len__(self) -> int:
        return len(self.labels)

    def steps(self, batch_size: int, world_size: int = 1) -> int:
        return len(self) // (batch_size * world_size)

    def shuffled(
        self, batch_size: int, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1,
        first: int = 0,
    ) -> Iterator[Batch]:  # fmt: skip
        step = batch_size * world_size
        device = self.labels.device
        order = sent(self.order(seed, epoch, step), device)
        mirror = sent(mirrored(len(self), seed, epoch), device) if self.alternating else None
        for start in range(first * step, len(self) - step + 1, step):
            mine = start + rank * batch_size
            chosen = order[mine : mine + batch_size]
            images = self.images[chosen]
            if mirror is not None:
                images = torch.where(mirror[chosen].view(-1, 1, 1, 1), images.flip(3), images)
            yield images, self.labels[chosen]

    def once(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        images, labels = self.images[rank::world_size], self.labels[rank::world_size]
        for start in range(0, len(labels), batch_size):
            stop = start + batch_size
            yield images[start:stop], labels[start:stop]

    def order(self, seed: int, epoch: int, step: int = 1) -> Tensor:
        """Return an epoch's order; each global batch of `step` images is sorted by lane."""
        if self.lanes is None:
            return epoch_order(len(self), seed, epoch)
        order, lane = self.lanes(seed, epoch)
        steps = lane + lane.max().add(1) * (torch.arange(len(order)) // step)
        return order[steps.argsort(stable=True)]

    def chosen(self, parts: Sequence[list[int]]) -> Iterator[Batch]:
        for part in parts:
            yield self.images[part], self.labels[part]

    def plain(self) -> MemorySplit:
        return replace(self, alternating=False)

    def to(self, device: torch.device) -> MemorySplit:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def fingerprint(self) -> str:
        """Return 16 hex digits of the pixels and labels."""
        digest = hashlib.sha256(self.images.cpu().contiguous().numpy().tobytes())
        digest.update(self.labels.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


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
    """What is done to a training batch: `data.augment`, with auto resolved."""
    fingerprint: str
    """16 hex digits of the training images and labels (of the manifest, for shards)."""
    config: DataConfig = DataConfig()
    """What it was loaded from."""

    def to(self, device: torch.device) -> DataSource:
        """Return the source with its batches on `device`."""
        splits = {name: getattr(self, name).to(device) for name in ("train", "validation", "test")}
        return replace(self, **splits)

    def normalisation(self) -> dict[str, list[float]]:
        """Return mean and deviation of each channel, for cards."""
        return {"mean": list(self.mean), "std": list(self.std)}

    def prepare(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Turn uint8 images into normalised floats; augment them if a generator is given."""
        wanted = parse(self.augment)
        if generator is not None and wanted.shift:
            images = augmented(images, generator, flip=wanted.flip)
            if wanted.rand:
                seeds = _seeds(len(images), generator)
                images = rand_augmented_batch(images, wanted.rand, seeds)
        return prepare(images, self.mean, self.std)

    def skip(self, generator: torch.Generator, batch_size: int, steps: int) -> None:
        """Advance the generator by what `prepare` draws in `steps` batches."""
        wanted = parse(self.augment)
        if not wanted.shift:
            return
        reach = max(1, self.image_size // 8)
        for _ in range(steps):
            _draws(batch_size, reach, generator)
            if wanted.rand:
                _seeds(batch_size, generator)

    def augmentation(self, seed: int, epoch: int, rank: int = 0) -> torch.Generator:
        """Return the generator of an epoch's augmentation on one rank."""
        return torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 4099 + rank)

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
            batch_size: a balanced batch of more images is cut into parts of so many.
            rank, world_size: return every `world_size`-th part, from number `rank` on.
        """
        return score_batches(
            self, samples_per_class, seed=seed, batches=batches, batch_size=batch_size,
            rank=rank, world_size=world_size,
        )  # fmt: skip

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


def prepare(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Scale uint8 images [B, C, H, W] to 0..1 and normalise each channel."""
    dtype = torch.get_default_dtype()
    shift, scale = (_per_channel(each, images.device, dtype) for each in (mean, std))
    return (images - shift) / scale


@lru_cache(maxsize=64)
def _per_channel(numbers: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return numbers [C] times 255 as [C, 1, 1], cached: a copy each step would hold up a GPU."""
    return torch.tensor(numbers, dtype=dtype).view(-1, 1, 1).mul(255).to(device)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device; the copy to a GPU does not block."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def augmented(images: Tensor, generator: torch.Generator, *, flip: bool) -> Tensor:
    """Shift every image by up to 1/8 of its side, edges repeated; mirror half of them if `flip`.

    One gather for the whole batch, on its device; the offsets, three numbers an image, come from
    a CPU generator.
    """
    count, channels, height, width = images.shape
    device = images.device
    draws, mirror = _draws(count, max(1, height // 8), generator)
    down, right, mirror = sent(torch.stack([*draws, mirror & flip]), device)
    rows = (torch.arange(height, device=device) + down).clamp(0, height - 1)
    columns = (torch.arange(width, device=device) + right).clamp(0, width - 1)
    columns = torch.where(mirror.bool(), columns.flip(1), columns)
    flat = (rows[:, :, None] * width + columns[:, None, :]).view(count, 1, -1)
    index = flat.expand(count, channels, height * width)
    return images.flatten(2).gather(2, index).view_as(images)


def _draws(count: int, reach: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw offsets [2, count, 1] and whether to mirror [count, 1]."""
    draws = torch.randint(-reach, reach + 1, (2, count, 1), generator=generator)
    return draws, torch.randint(0, 2, (count, 1), generator=generator).bool()


def _seeds(count: int, generator: torch.Generator) -> list[int]:
    """Draw a seed per image for RandAugment."""
    return torch.randint(2**31, (count,), generator=generator).tolist()


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return a permutation that is fixed by (seed, epoch)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)


def mirrored(count: int, seed: int, epoch: int) -> Tensor:
    """Return which images an epoch of alternating flips mirrors: a bool tensor [count].

    In the first epoch about half of them, drawn by `seed`; after that each image in turn as it is
    and mirrored. Source: K. Jordan, 94% on CIFAR-10 in 3.29 Seconds on a Single GPU (2024), arXiv
    2404.00498, section 3.6: any two epochs in a row show both sides of every image.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + FLIP_SALT)
    first = torch.randint(0, 2, (count,), generator=generator).bool()
    return first if epoch % 2 == 0 else ~first


def stratified(labels: Tensor, fraction: float, *, salt: int = 0) -> tuple[Tensor, Tensor]:
    """Split positions into (rest, chosen): `fraction` of every class chosen, always the same.

    The total is exact (rounded); what the classes' fractions leave over goes to the largest
    remainders. Every class of two or more images has at least one in each part if that is
    possible.
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED + salt)
    classes = labels.unique().tolist()
    places = {label: (labels == label).nonzero().squeeze(1) for label in classes}
    counts = _shares({label: len(places[label]) for label in classes}, fraction)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in classes:
        order = torch.randperm(len(places[label]), generator=generator)
        chosen[places[label][order[: counts[label]]]] = True
    return (~chosen).nonzero().squeeze(1), chosen.nonzero().squeeze(1)


def _shares(sizes: dict[int, int], fraction: float) -> dict[int, int]:
    """Split round(fraction * total) over classes in proportion, leaving each a rest."""
    total = round(fraction * sum(sizes.values()))
    ideal = {label: size * fraction for label, size in sizes.items()}
    most = {label: max(size - 1, 1) for label, size in sizes.items()}
    least = {label: min(1, most[label]) if size > 1 else 0 for label, size in sizes.items()}
    counts = {label: min(max(int(ideal[label]), least[label]), most[label]) for label in sizes}
    while (missing := total - sum(counts.values())) > 0:
        open_ = [label for label in sizes if counts[label] < most[label]]
        if not open_:
            break
        open_.sort(key=lambda label: counts[label] - ideal[label])
        for label in open_[:missing]:
            counts[label] += 1
    return counts


def first_cause(error: Exception) -> UsageError:
    """Return a worker process's UsageError without the traceback that DataLoader wraps it in."""
    last = str(error).strip().splitlines()[-1]
    return UsageError(last.removeprefix("autosparse.core.errors.UsageError: "))


def limited_places(labels: Tensor, limit: int | None) -> Tensor:
    """Return the positions of `limit` images, stratified, always the same ones."""
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    classes = len(labels.unique())
    if limit < classes:
        raise UsageError(f"data.train_limit must be at least {classes}, one per class: {limit}")
    return stratified(labels, limit / len(labels), salt=1)[1]


def limited(train: MemorySplit, limit: int | None) -> MemorySplit:
    """Keep `limit` training images, stratified, always the same ones."""
    if limit is None or limit >= len(train):
        return train
    chosen = limited_places(train.labels, limit)
    return MemorySplit(train.images[chosen], train.labels[chosen])


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel of uint8 images, in units of 0..1."""
    flat = images.transpose(0, 1).flatten(1).double() / 255
    return tuple(flat.mean(1).tolist()), tuple(flat.std(1).clamp(min=1e-3).tolist())


def resized(images: Tensor, size: int) -> Tensor:
    """Resize square uint8 images [N, C, H, W] to `size`, antialiased bilinear."""
    if images.shape[-1] == size and images.shape[-2] == size:
        return images
    parts = [
        torch.nn.functional.interpolate(
            part.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False
        )
        for part in images.split(4096)
    ]
    return torch.cat([part.round().clamp(0, 255).byte() for part in parts])


def in_memory(
    name: str,
    train: MemorySplit,
    test: MemorySplit,
    *,
    num_classes: int,
    validation_fraction: float,
    train_limit: int | None,
    augment: str,
    validation: MemorySplit | None = None,
    normalisation: Constants | None = None,
) -> DataSource:
    """Assemble a source from whole splits; validation is cut from train unless it is given.

    `normalisation` is measured on the training images unless it is given.
    """
    if validation is None:
        rest, held_out = stratified(train.labels, validation_fraction)
        validation = MemorySplit(train.images[held_out], train.labels[held_out])
        train = MemorySplit(train.images[rest], train.labels[rest])
    train = limited(train, train_limit)
    train = replace(train, alternating=parse(augment).alternating)
    mean, std = normalisation or channel_statistics(train.images)
    return DataSource(
        name=name,
        train=train,
        validation=validation,
        test=test,
        num_classes=num_classes,
        in_chans=train.images.shape[1],
        image_size=train.images.shape[-1],
        mean=mean,
        std=std,
        augment=augment,
        fingerprint=train.fingerprint(),
    )
