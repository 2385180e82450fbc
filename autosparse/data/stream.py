"""Splits that are too large for memory: worker processes decode whole batches.

The order of the samples is worked out before they are dealt out, so it depends neither on the
number of workers nor, for the same global batch, on the number of ranks.
"""

from __future__ import annotations

import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from autosparse.data import augment
from autosparse.data.decode import decode
from autosparse.data.source import Batch, MemorySplit, first_cause
from autosparse.errors import RunFailed, UsageError
from autosparse.memory import keep_freed_blocks

Task = tuple[list[int], tuple[int, int] | None]
"""The samples of a batch, and (seed, epoch) where they are augmented."""
Order = tuple[list[int], tuple[int, int] | None, int | None]
"""A task, and the room that a worker process puts its images into."""
BadImages = dict[str, str]
"""Sample -> what is wrong with its image."""
Found = tuple[Tensor | int, list[int], list[tuple[str, str]]]
"""A batch's images (or the room they are in), labels, and bad images with what is wrong."""
PREFETCH = 2
"""Batches that a worker process is asked for in advance."""
STOPS = (signal.SIGTERM, signal.SIGUSR1)
"""What launchers send to all processes of a training that is to save and end."""
LENT = 2
"""Rooms that batches keep to themselves: the one in use, and the one before, not yet let go."""


class Samples(Protocol):
    """Encoded images and their labels, by number."""

    def __len__(self) -> int: ...

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
        """Return a sample's encoded image and its label."""
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

    def __len__(self) -> int:
        return len(self.samples)

    def steps(self, batch_size: int, world_size: int = 1) -> int:
        return len(self) // (batch_size * world_size)

    def shuffled(
        self, batch_size: int, *, seed: int, epoch: int, rank: int = 0, world_size: int = 1,
        first: int = 0,
    ) -> Iterator[Batch]:  # fmt: skip
        order, lane = self.samples.order(seed, epoch)
        step = batch_size * world_size
        tasks: list[Task] = []
        for start in range(first * step, len(order) - step + 1, step):
            together = order[start : start + step]
            together = together[lane[start : start + step].argsort(stable=True)]
            mine = together[rank * batch_size : (rank + 1) * batch_size]
            tasks.append((mine.tolist(), (seed, epoch)))
        yield from self._batches(tasks, replaced=True)

    def once(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        numbers = self.samples.share(rank, world_size)
        parts = [numbers[n : n + batch_size] for n in range(0, len(numbers), batch_size)]
        yield from self._batches([(part, None) for part in parts], replaced=False)

    def _batches(self, tasks: list[Task], *, replaced: bool) -> Iterator[Batch]:
        """Yield a batch for each task, but for those of bad images only."""
        if self.device.type == "cpu":
            keep_freed_blocks()
        workers = min(self.workers, len(tasks))
        largest = max((len(numbers) for numbers, _ in tasks), default=0)
        rooms = _Rooms(workers, largest, self.size)
        loader = DataLoader(
            _Decoded(self, replaced, rooms.memory),
            batch_size=None,
            sampler=((*task, rooms.take()) for task in tasks),  # type: ignore[arg-type]
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            worker_init_fn=_outlive_stops,
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        )
        with _undisturbed():
            batches = iter(loader)
        try:
            for images, labels, bad in batches:
                self._count(bad)
                if isinstance(images, int):
                    images = rooms.batch(images, len(labels))
                if labels:
                    yield self._here(images), self._here(torch.tensor(labels))
                del images
        except UsageError as error:
            raise first_cause(error) from error
        except (RuntimeError, EOFError, ConnectionError) as error:
            dead = _deaths(batches)
            if not dead:
                raise
            raise RunFailed(f"a process that decodes images died: {dead}") from error
        finally:
            _end(batches)

    def _here(self, tensor: Tensor) -> Tensor:
        """Return the tensor on the device."""
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _count(self, bad: list[tuple[str, str]]) -> None:
        for name, problem in bad:
            if name in self.bad:
                continue
            self.bad[name] = problem
            if len(self.bad) > self.max_bad_images:
                raise too_many(name, problem, self.max_bad_images)
            print(
                f"warning: {name}: {problem}; bad image {len(self.bad)} of at most "
                f"{self.max_bad_images} (data.max_bad_images)",
                file=sys.stderr,
                flush=True,
            )

    def in_memory(self) -> MemorySplit:
        """Decode the whole split."""
        parts = list(self.to(torch.device("cpu")).once(256))
        return MemorySplit(
            torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])
        )

    def plain(self) -> Stream:
        return replace(self, augment="none")

    def to(self, device: torch.device) -> Stream:
        return replace(self, device=device)


def too_many(name: str, problem: str, limit: int) -> UsageError:
    """Return the error for one bad image more than is allowed."""
    return UsageError(f"{name}: {problem}; data.max_bad_images allows {limit} bad images")


class _Rooms:
    """Memory that all processes share, cut into rooms for a batch each, used again and again.

    (The pages of new shared memory take long to come by.) A batch is its room, without a copy,
    and the room is free once nothing holds the batch's memory any more. Where batches are kept,
    the next ones are copied out, so that there is a free room for each batch that is asked for.
    """

    def __init__(self, workers: int, images: int, size: int) -> None:
        # One more: the next batch is asked for before the last one received is handed out.
        count = workers * PREFETCH + LENT + 1 if workers else 0
        shape = (count, images, 3, size, size)
        self.memory = torch.empty(shape, dtype=torch.uint8).share_memory_()
        self.free, self.lent = list(range(count)), set[int]()

    def take(self) -> int | None:
        """Return a free room; None where there are no worker processes."""
        return self.free.pop() if len(self.memory) else None

    def batch(self, room: int, count: int) -> Tensor:
        """Return the images in a room."""
        images = self.memory[room, :count]
        if len(self.lent) >= LENT:
            self.free.append(room)
            return images.clone()
        self.lent.add(room)
        array = images.numpy()  # What torch makes of it, and all views of that, keep it alive.
        weakref.finalize(array, self._back, room).atexit = False
        return torch.from_numpy(array)

    def _back(self, room: int) -> None:
        self.lent.discard(room)
        self.free.append(room)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Start worker processes that no signal reaches before they are ready for it.

    Of a worker that dies the loop is told when it next waits for it: torch's handler of SIGCHLD
    would raise an error in whatever this process is doing, writing a checkpoint, say.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outlive_stops(worker: int) -> None:
    """Leave it to the process that trains to save, and then to end this one."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def _deaths(batches: Iterator) -> str:
    """Say how worker processes ended that should not have; nothing where none did."""
    codes = [worker.exitcode for worker in getattr(batches, "_workers", [])]
    return ", ".join(
        f"killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -9 else "")
        if code < 0 else f"exit code {code}"
        for code in codes if code
    )  # fmt: skip


def _end(batches: Iterator) -> None:
    """End the worker processes now.

    Left to the garbage collector, an iterator whose loop was broken off by an error may be
    collected in a process forked later, which then waits for workers that are not its children.
    """
    shutdown = getattr(batches, "_shutdown_workers", None)
    if shutdown is not None:
        for worker in batches._workers:  # type: ignore[attr-defined]
            worker.terminate = worker.kill  # They do not hear what torch resorts to.
        shutdown()


def _as_it_is(found: Found) -> Found:
    """Leave it to the main process to make tensors: each would come in shared memory of its own."""
    return found


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
            content, label = self.samples.read(number)
            try:
                if seed and self.wanted.crop:
                    seed(number)
                    room.copy_(self._augmented(content))
                else:
                    decode(content, self.size, into=room)
                return label
            except UsageError as error:
                name, problem = self.samples.name(number), " ".join(str(error).split())
            bad[name] = problem
            if len(bad) > self.limit:
                raise too_many(name, problem, self.limit)
            if not self.replaced:
                return None
            number = self.samples.neighbour(number)
            if number == asked:
                raise UsageError(f"{name}: {problem}; none of its neighbours can be decoded")

    def _augmented(self, content: bytes) -> Tensor:
        image = decode(content, self.size, augment.random_crop)
        if augment.coin():
            image = image.flip(2)
        if self.wanted.rand:
            image = augment.rand_augmented(image, self.wanted.rand)
        return image
