"""Worker processes that decode batches into memory that they share with the main process."""

from __future__ import annotations

import atexit
import math
import os
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from autosparse.core.errors import UsageError

Task = tuple[list[int], tuple[int, int] | None]
"""The samples of a batch, and (seed, epoch) where they are augmented."""
Order = tuple[list[int], tuple[int, int] | None, int | None]
"""A task, and the room that a worker process puts its images into."""
Found = tuple[Tensor | int, list[int], list[tuple[str, str]]]
"""A batch's images (or the room they are in), labels, and bad images with what is wrong."""
PREFETCH = 2
"""Batches that a worker process is asked for in advance."""
STOPS = (signal.SIGTERM, signal.SIGUSR1)
"""What launchers send to all processes of a training that is to save and end."""
SHARED = Path("/dev/shm")
LENT = 2
"""Rooms that batches keep to themselves: the one in use, and the one before, not yet let go."""


class Crew:
    """Worker processes that decode batches, epoch after epoch; none at all if `workers` is 0.

    Args:
        decoded: makes of the rooms' memory the data set that decodes (an order -> what was found).
        workers: how many processes.
        largest: images of a batch, at the most.
        size: side of an image.
    """

    def __init__(
        self, decoded: Callable[[Tensor], Dataset], workers: int, largest: int, size: int
    ) -> None:
        self.workers, self.largest = workers, largest
        self.rooms = Rooms(workers, largest, size)
        self.orders = _Orders(self.rooms)
        self.batches: Any = None
        self.loader = DataLoader(
            decoded(self.rooms.memory),
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

    def __init__(self, rooms: Rooms) -> None:
        self.rooms = rooms
        self.tasks: Iterable[Task] = ()

    def __iter__(self) -> Iterator[Order]:
        return ((*task, self.rooms.take()) for task in self.tasks)


_crews: weakref.WeakSet[Crew] = weakref.WeakSet()
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


class Rooms:
    """Memory that all processes share, cut into rooms for a batch each, used again and again.

    (The pages of new shared memory take long to come by.) A batch is its room, without a copy,
    and the room is free once nothing holds the batch's memory any more. Where batches are kept,
    the next ones are copied out, so that there is a free room for each batch that is asked for.
    """

    def __init__(self, workers: int, images: int, size: int) -> None:
        # One more: the next batch is asked for before the last one received is handed out.
        count = workers * PREFETCH + LENT + 1 if workers else 0
        shape = (count, images, 3, size, size)
        check_room(math.prod(shape), workers)
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


def check_room(needed: int, workers: int) -> None:
    """Raise UsageError if so many bytes do not fit into the memory that processes share.

    Linux has it in a file system of its own, 64 MB in a container by default; where it is full,
    a process is killed (SIGBUS) that touches what it was given.
    """
    if not workers or not SHARED.is_dir():
        return
    free = shutil.disk_usage(SHARED).free
    if free < needed:
        raise UsageError(
            f"{SHARED} has {free / 1e6:.0f} MB free, and {workers} data.workers need "
            f"{needed / 1e6:.0f} MB for their batches: give it more (docker run --shm-size), or "
            "lower data.workers or the batch"
        )


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
