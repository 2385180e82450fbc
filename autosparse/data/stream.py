"""Splits that are too large for memory: worker processes decode whole batches.

The order of the samples is worked out before they are dealt out, so it depends neither on the
number of workers nor, for the same global batch, on the number of ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from autosparse.data.crew import Crew, Found, Order, Task
from autosparse.data.decode import BadImage, decode
from autosparse.data.source import Batch, MemorySplit, first_cause, sent

logger = logging.getLogger(__name__)
CHUNK = 256
"""Images that are read before they are decoded by threads."""

BadImages = dict[str, str]
"""Sample -> what is wrong with its image."""


class Samples(Protocol):
    """Encoded images and their labels, by number."""

    def __len__(self) -> int: ...

    def labels(self) -> Tensor:
        """Return the label of every sample [N], without a look at the images."""
        ...

    def order(self, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the samples in an epoch's order, and for each what to sort a batch by."""
        ...

    def share(self, rank: int, world_size: int) -> list[int]:
        """Return the samples that a rank evaluates."""
        ...

    def prepare(self, numbers: list[int]) -> None:
        """Check what these samples lie in, where that has not been done."""
        ...

    def read(self, number: int) -> tuple[bytes, int]:
        """Return a sample's encoded image and its label; raise BadImage where it has none."""
        ...

    def name(self, number: int) -> str:
        """Return how messages call a sample."""
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
    """Worker processes that have finished an epoch and wait for the next; one crew at most."""

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
        return Crew(partial(_Decoded, self, replaced), workers, largest, self.size)

    def _batches(self, crew: Crew, tasks: Iterable[Task]) -> Iterator[Batch]:
        """Yield a batch for each task, but for those of bad images only.

        The crew is still there at the end; it is ended where the loop is broken off.
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
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(self), CHUNK):
                numbers = list(range(start, min(start + CHUNK, len(self))))
                self.samples.prepare(numbers)
                tried = pool.map(partial(_decoded, self.size), map(self._content, numbers),
                                 images[start : start + CHUNK])  # fmt: skip
                for number, (problem, label) in zip(numbers, list(tried), strict=True):
                    place = len(labels)
                    if problem:
                        found = self._instead(number, problem, images[place], replaced=replaced)
                        labels += [] if found is None else [found]
                    else:
                        if place != number:
                            images[place] = images[number]
                        labels.append(label)
        return MemorySplit(images[: len(labels)], torch.tensor(labels, dtype=torch.int64))

    def _content(self, number: int) -> tuple[bytes | BadImage, int]:
        try:
            return self.samples.read(number)
        except BadImage as error:
            return error, 0

    def _instead(self, number: int, problem: str, room: Tensor, *, replaced: bool) -> int | None:
        """Count a bad image; put the next good one into its room if it is to be replaced."""
        asked = number
        while True:
            name = self.samples.name(number)
            self._count([(name, problem)])
            if not replaced:
                return None
            number = self.samples.neighbour(number)
            if number == asked:
                raise no_neighbour(name, problem)
            self.samples.prepare([number])
            problem, label = _decoded(self.size, self._content(number), room)
            if not problem:
                return label

    def plain(self) -> Stream:
        return replace(self, augment="none", resting=[])

    def to(self, device: torch.device) -> Stream:
        return replace(self, device=device)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "resting": []}


def too_many(name: str, problem: str, limit: int) -> UsageError:
    """Return the error for one bad image more than is allowed."""
    return UsageError(f"{name}: {problem}; data.max_bad_images allows {limit} bad images")


def no_neighbour(name: str, problem: str) -> UsageError:
    """Return the error for a bad image that nothing can stand in for."""
    return UsageError(f"{name}: {problem}; none of its neighbours can be decoded")


def _decoded(size: int, sample: tuple[bytes | BadImage, int], room: Tensor) -> tuple[str, int]:
    """Decode a sample into its room; return what is wrong with it, if anything, and its label."""
    content, label = sample
    try:
        if isinstance(content, BadImage):
            raise content
        decode(content, size, into=room)
    except BadImage as error:
        return one_line(error), label
    return "", label


def one_line(error: Exception) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).split())


class _Decoded(Dataset):
    """Whole batches, made in a worker process."""

    def __init__(self, stream: Stream, replaced: bool, rooms: Tensor) -> None:
        self.samples, self.size, self.limit = stream.samples, stream.size, stream.max_bad_images
        self.wanted = augment.parse(stream.augment)
        self.replaced, self.rooms = replaced, rooms

    def __getitem__(self, order: Order) -> Found:
        numbers, epoch, own = order
        self.samples.prepare(numbers)
        shape = (len(numbers), 3, self.size, self.size)
        images = torch.empty(shape, dtype=torch.uint8) if own is None else self.rooms[own]
        labels: list[int] = []
        bad: dict[str, str] = {}
        with augment.python_rng() as seed:
            for number in numbers:
                room, drawn = images[len(labels)], partial(seed, *epoch) if epoch else None
                label = self._sample(number, room, drawn, bad)
                if label is not None:
                    labels.append(label)
        found = images[: len(labels)] if own is None else own
        return found, labels, list(bad.items())

    def _sample(
        self, number: int, room: Tensor, seed: Callable[[int], None] | None, bad: dict[str, str]
    ) -> int | None:
        """Put a sample into its room, and return its label; seed: augment it.

        Where its image is bad, its neighbour is taken, or None returned.
        """
        asked = number
        while True:
            try:
                content, label = self.samples.read(number)
                if seed and self.wanted.crop:
                    seed(number)
                    room.copy_(self._augmented(content))
                else:
                    decode(content, self.size, into=room)
                return label
            except BadImage as error:
                name, problem = self.samples.name(number), one_line(error)
            bad[name] = problem
            if len(bad) > self.limit:
                raise too_many(name, problem, self.limit)
            if not self.replaced:
                return None
            number = self.samples.neighbour(number)
            if number == asked:
                raise no_neighbour(name, problem)

    def _augmented(self, content: bytes) -> Tensor:
        image = decode(content, self.size, augment.random_crop)
        if augment.coin():
            image = image.flip(2)
        if self.wanted.rand:
            image = augment.rand_augmented(image, self.wanted.rand)
        return image
