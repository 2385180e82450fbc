"""Splits that are too large for memory: worker processes decode whole batches.

The order of the samples is worked out before they are dealt out, so it depends neither on the
number of workers nor, for the same global batch, on the number of ranks.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

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
    resting: list[_Crew] = field(default_factory=list, repr=False, compare=False)
    """Worker processes that have finished an epoch and wait for the next; one crew at most."""

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
        crew = crew or _Crew(self, workers, batch_size, replaced=True)
        yield from self._batches(crew, tasks())
        if not self.resting:
            self.resting.append(crew)
        else:
            crew.end()

    def once(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        numbers = self.samples.share(rank, world_size)
        starts = range(0, len(numbers), batch_size)
        crew = _Crew(self, min(self.workers, len(starts)), batch_size, replaced=False)
        yield from self._batches(
            crew, ((numbers[start : start + batch_size], None) for start in starts)
        )
        crew.end()

    def _batches(self, crew: _Crew, tasks: Iterable[Task]) -> Iterator[Batch]:
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
                    yield self._here(images), self._here(torch.tensor(labels))
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
        return replace(self, augment="none", resting=[])

    def to(self, device: torch.device) -> Stream:
        return replace(self, device=device)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "resting": []}


def too_many(name: str, problem: str, limit: int) -> UsageError:
    """Return the error for one bad image more than is allowed."""
    return UsageError(f"{name}: {problem}; data.max_bad_images allows {limit} bad images")


class _Crew:
    """Worker processes that decode batches, epoch after epoch; none at all if `workers` is 0."""

    def __init__(self, stream: Stream, workers: int, largest: int, *, replaced: bool) -> None:
        self.workers, self.largest = workers, largest
        self.rooms = _Rooms(workers, largest, stream.size)
        self.orders = _Orders(self.rooms)
        self.batches: Any = None
        self.loader = DataLoader(
            _Decoded(stream, replaced, self.rooms.memory),
            batch_size=None,
            sampler=self.orders,  # type: ignore[arg-type]
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            persistent_workers=workers > 0,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            worker_init_fn=_outlive_stops,
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        )
        if workers:
            _crews.add(self)
            atexit.unregister(_end_all)
            atexit.register(_end_all)  # Last, so first to be called: before torch's own.

    def work(self, tasks: Iterable[Task]) -> Iterator[tuple[Tensor, list[int], list]]:
        """Yield images, labels and bad images of each task."""
        self.orders.tasks = tasks
        new = self.batches is None
        with _undisturbed():
            self.batches = iter(self.loader)
        if new:
            weakref.finalize(self, _kill, self.processes(), os.getpid())
        for images, labels, bad in self.batches:
            if isinstance(images, int):
                images = self.rooms.batch(images, len(labels))
            yield images, labels, bad
            del images

    def processes(self) -> list[Any]:
        """Return the worker processes, as far as they were begun."""
        return getattr(self.loader._iterator, "_workers", [])

    def deaths(self) -> str:
        """Say how worker processes ended that should not have; nothing where none did."""
        codes = [process.exitcode for process in self.processes()]
        return ", ".join(
            f"killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -9 else "")
            if code < 0 else f"exit code {code}"
            for code in codes if code
        )  # fmt: skip

    def end(self) -> None:
        """End the worker processes now.

        Left to torch at the end of the program, they may be told by SIGTERM, which they do not
        hear; left to the garbage collector, through queues that are half collected themselves.
        """
        _crews.discard(self)
        _kill(self.processes(), os.getpid())
        if self.workers and self.loader._iterator is not None:
            self.loader._iterator._shutdown_workers()  # type: ignore[attr-defined]


class _Orders:
    """What a crew is to do in the epoch under way: each task with a room for its images."""

    def __init__(self, rooms: _Rooms) -> None:
        self.rooms = rooms
        self.tasks: Iterable[Task] = ()

    def __iter__(self) -> Iterator[Order]:
        return ((*task, self.rooms.take()) for task in self.tasks)


_crews: weakref.WeakSet[_Crew] = weakref.WeakSet()
"""Those that have worker processes."""


def _kill(workers: list[Any], owner: int) -> None:
    """End processes that read and decode: there is nothing that they could leave half done."""
    if os.getpid() == owner:
        for worker in workers:
            worker.kill()


def _end_all() -> None:
    for crew in list(_crews):
        crew.end()


def _forget_crews() -> None:
    """In a forked process: what is collected here must not end or await workers of another."""
    for crew in list(_crews):
        if crew.loader._iterator is not None:
            crew.loader._iterator._shutdown = True  # type: ignore[attr-defined]
    _crews.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_crews)


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
