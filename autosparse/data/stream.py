"""Streamed splits, for data too large for memory: worker processes decode whole batches.

The order of the samples is worked out before they are dealt out, so it depends neither on the
number of workers nor, for the same global batch, on the number of ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from autosparse.core.errors import RunFailed, UsageError
from autosparse.core.memory import keep_freed_blocks
from autosparse.data import augment
from autosparse.data.config import DataConfig
from autosparse.data.crew import Crew, Order, Result, Task
from autosparse.data.decode import BadImage, decode
from autosparse.data.normalisation import IMAGENET
from autosparse.data.source import Batch, DataSource, MemorySplit, first_cause, sent

logger = logging.getLogger(__name__)
CHUNK = 64
"""Images that a thread decodes in one go, for a split held in memory."""

BadImages = dict[str, str]
"""Sample -> what is wrong with its image."""


class Samples(Protocol):
    """Encoded images and their labels, by number."""

    def __len__(self) -> int: ...

    def labels(self) -> Tensor:
        """Return the label of every sample [N], without a look at the images."""
        ...

    def order(self, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the samples in an epoch's order [N], and their lanes [N], to sort batches by."""
        ...

    def share(self, rank: int, world_size: int) -> list[int]:
        """Return the samples that a rank evaluates."""
        ...

    def prepare(self, numbers: list[int]) -> None:
        """Check the files that hold these samples, unless that has been done."""
        ...

    def read(self, number: int) -> tuple[bytes, int]:
        """Return a sample's encoded image and its label; raise BadImage where it has none."""
        ...

    def name(self, number: int) -> str:
        """Return the name of a sample in messages."""
        ...

    def neighbour(self, number: int) -> int:
        """Return the sample that stands in for one that cannot be decoded."""
        ...


@dataclass(frozen=True)
class Stream:
    """A split whose images are read and decoded as they are needed."""

    samples: Samples
    size: int
    workers: int = 0
    augment: str = "none"
    max_bad_images: int = 0
    bad: BadImages = field(default_factory=dict)
    """Bad images met so far; shared by the splits of a source."""
    device: torch.device = torch.device("cpu")
    resting: list[Crew] = field(default_factory=list, repr=False, compare=False)
    """The crew that has finished an epoch and waits for the next; at most one."""

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def labels(self) -> Tensor:
        return self.samples.labels()

    def order(self, seed: int, epoch: int) -> Tensor:
        return self.samples.order(seed, epoch)[0]

    def steps(self, batch_size: int, world_size: int = 1) -> int:
        return len(self) // (batch_size * world_size)

    def shuffled(
        self, batch_size: int, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1,
        first: int = 0,
    ) -> Iterator[Batch]:  # fmt: skip
        order, lane = self.samples.order(seed, epoch)
        step = batch_size * world_size
        starts = range(first * step, len(order) - step + 1, step)

        def tasks() -> Iterator[Task]:
            for start in starts:
                together = order[start : start + step]
                together = together[lane[start : start + step].argsort(stable=True)]
                mine = together[rank * batch_size : (rank + 1) * batch_size]
                yield mine.tolist(), (seed, epoch)

        workers = min(self.workers, len(starts))
        crew = self.resting.pop() if self.resting else None
        if crew is not None and (crew.workers, crew.largest) != (workers, batch_size):
            crew.end()
            crew = None
        crew = crew or self._crew(workers, batch_size, replaced=True)
        yield from self._batches(crew, tasks())
        if not self.resting:
            self.resting.append(crew)
        else:
            crew.end()

    def once(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        numbers = self.samples.share(rank, world_size)
        starts = range(0, len(numbers), batch_size)
        yield from self.chosen([numbers[start : start + batch_size] for start in starts])

    def chosen(self, parts: Sequence[list[int]]) -> Iterator[Batch]:
        crew = self._crew(
            min(self.workers, len(parts)), max(map(len, parts), default=0), replaced=False
        )
        yield from self._batches(crew, ((part, None) for part in parts))
        crew.end()

    def _crew(self, workers: int, largest: int, *, replaced: bool) -> Crew:
        return Crew(partial(_Decoder, self, replaced), workers, largest, self.size)

    def _batches(self, crew: Crew, tasks: Iterable[Task]) -> Iterator[Batch]:
        """Yield a batch for each task, unless all its images are bad.

        The crew is kept at the end; it is ended if the loop stops early.
        """
        if self.device.type == "cpu":
            keep_freed_blocks()
        whole = False
        try:
            for images, labels, bad in crew.work(tasks):
                self._count(bad)
                if labels:
                    yield sent(images, self.device), sent(torch.tensor(labels), self.device)
                del images
            whole = True
        except UsageError as error:
            raise first_cause(error) from error
        except (RuntimeError, EOFError, ConnectionError) as error:
            dead = crew.deaths()
            if not dead:
                raise
            raise RunFailed(f"a process that decodes images died: {dead}") from error
        finally:
            if not whole:
                crew.end()

    def _count(self, bad: list[tuple[str, str]]) -> None:
        for name, problem in bad:
            if name in self.bad:
                continue
            self.bad[name] = problem
            if len(self.bad) > self.max_bad_images:
                raise too_many(name, problem, self.max_bad_images)
            logger.warning(
                "%s: %s; bad image %d of at most %d (data.max_bad_images)",
                name, problem, len(self.bad), self.max_bad_images,
            )  # fmt: skip

    def in_memory(self, *, replaced: bool = False) -> MemorySplit:
        """Decode the whole split by threads; neighbours stand in for bad images if `replaced`."""
        images = torch.empty((len(self), 3, self.size, self.size), dtype=torch.uint8)
        labels: list[int] = []
        decoder = _Decoder(replace(self, augment="none"), replaced, torch.empty(0))

        def parts() -> Iterator[list[int]]:
            for start in range(0, len(self), CHUNK):
                numbers = list(range(start, min(start + CHUNK, len(self))))
                self.samples.prepare(numbers)  # Here: several threads would do the same.
                yield numbers

        def decoded(numbers: list[int]) -> tuple[Tensor, list[int], list[tuple[str, str]]]:
            return decoder.decoded(numbers, images[numbers[0] : numbers[-1] + 1])

        with ThreadPoolExecutor() as pool:
            for chunk, more, bad in pool.map(decoded, parts()):
                self._count(bad)
                place = images[len(labels) : len(labels) + len(more)]
                if place.data_ptr() != chunk.data_ptr():  # Some before it were left out.
                    place.copy_(chunk.clone())
                labels += more
        return MemorySplit(images[: len(labels)], torch.tensor(labels, dtype=torch.int64))

    def plain(self) -> Stream:
        return replace(self, augment="none", resting=[])

    def to(self, device: torch.device) -> Stream:
        return replace(self, device=device)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "resting": []}


def streams(
    splits: Mapping[str, Samples], size: int, config: DataConfig, wanted: str
) -> dict[str, Stream]:
    """Return a stream for each split; only train is augmented, as `wanted` says."""
    bad: BadImages = {}
    return {
        name: Stream(
            samples,
            size,
            config.workers,
            wanted if name == "train" else "none",
            config.max_bad_images,
            bad,
        )
        for name, samples in splits.items()
    }


def streamed_source(
    name: str, splits: dict[str, Stream], num_classes: int, fingerprint: str
) -> DataSource:
    """Return streamed splits as a source, normalised by ImageNet's constants."""
    train = splits["train"]
    mean, std = IMAGENET
    return DataSource(
        name, train, splits["validation"], splits["test"], num_classes, 3, train.size,
        mean, std, train.augment, fingerprint,
    )  # fmt: skip


def too_many(name: str, problem: str, limit: int) -> UsageError:
    """Return the error for one bad image more than is allowed."""
    return UsageError(f"{name}: {problem}; data.max_bad_images allows {limit} bad images")


class _Decoder(Dataset):
    """Decodes whole batches, in a worker process or thread.

    Args:
        stream: whose images.
        replaced: whether neighbours stand in for bad images; otherwise these are left out.
        buffers: memory shared with the main process, [buffers, images, 3, size, size].
    """

    def __init__(self, stream: Stream, replaced: bool, buffers: Tensor) -> None:
        self.samples, self.size, self.limit = stream.samples, stream.size, stream.max_bad_images
        self.wanted = augment.parse(stream.augment)
        self.replaced, self.buffers = replaced, buffers

    def __getitem__(self, order: Order) -> Result:
        """Carry out an order; the images stay in its buffer where it has one."""
        numbers, epoch, buffer = order
        with augment.python_rng() as seed:
            images, labels, bad = self.decoded(
                numbers,
                None if buffer is None else self.buffers[buffer],
                partial(seed, *epoch) if epoch and self.wanted.crop else None,
            )
        return images if buffer is None else buffer, labels, bad

    def decoded(
        self,
        numbers: list[int],
        images: Tensor | None = None,
        seed: Callable[[int], None] | None = None,
    ) -> tuple[Tensor, list[int], list[tuple[str, str]]]:
        """Decode samples.

        Args:
            numbers: of the samples.
            images: where the images go; by default a new tensor.
            seed: seeds the RNGs for a sample, which is then augmented.

        Returns:
            The images, their labels, and name and problem of each bad one.
        """
        self.samples.prepare(numbers)
        if images is None:
            images = torch.empty((len(numbers), 3, self.size, self.size), dtype=torch.uint8)
        labels: list[int] = []
        bad: dict[str, str] = {}
        for number in numbers:
            label = self._decode(number, images[len(labels)], seed, bad)
            if label is not None:
                labels.append(label)
        return images[: len(labels)], labels, list(bad.items())

    def _decode(
        self, number: int, image: Tensor, seed: Callable[[int], None] | None, bad: dict[str, str]
    ) -> int | None:
        """Decode a sample into `image` and return its label.

        Where its image is bad, the next good one is taken, or None returned.
        """
        first = number
        while True:
            try:
                content, label = self.samples.read(number)
                if seed:
                    seed(number)
                    image.copy_(self._augmented(content))
                else:
                    decode(content, self.size, into=image)
                return label
            except BadImage as error:
                name, problem = self.samples.name(number), " ".join(str(error).split())
            bad[name] = problem
            if len(bad) > self.limit:
                raise too_many(name, problem, self.limit)
            if not self.replaced:
                return None
            number = self.samples.neighbour(number)
            if number == first:
                raise UsageError(f"{name}: {problem}; none of its neighbours can be decoded")

    def _augmented(self, content: bytes) -> Tensor:
        image = decode(content, self.size, augment.random_crop)
        if augment.coin():
            image = image.flip(2)
        if self.wanted.rand:
            image = augment.rand_augmented(image, self.wanted.rand)
        return image
