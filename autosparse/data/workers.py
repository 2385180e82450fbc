"""Worker processes that decode batches into memory shared with the main process."""

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
"""The samples of a batch, and (seed, epoch) if they are augmented."""
Order = tuple[list[int], tuple[int, int] | None, int | None]
"""A task, and the number of the buffer that a worker process puts its images into."""
Result = tuple[Tensor | int, list[int], list[tuple[str, str]]]
"""A batch's images (or the number of their buffer), labels, and name and problem of bad images."""
PREFETCH = 2
"""Batches that a worker process is asked for in advance."""
STOPS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals by which launchers tell all processes of a training to save and end."""
SHARED = Path("/dev/shm")
"""Where Linux keeps memory that processes share."""
LENT = 2
"""Buffers that batches may hold: one for the batch in use, one for the batch before it."""


class WorkerPool:
    """Worker processes that decode batches, epoch after epoch; none at all if `workers` is 0.

    Args:
        decoded: makes the data set that decodes (an order -> a result) into these buffers.
        workers: how many processes.
        largest: images of a batch, at the most.
        size: side of an image.
    """

    def __init__(
        self, decoded: Callable[[Tensor], Dataset], workers: int, largest: int, size: int
    ) -> None:
        self.workers, self.largest = workers, largest
        self.buffers = Buffers(workers, largest, size)
        self.orders = _Orders(self.buffers)
        self.batches: Any = None
        self.loader = DataLoader(
            decoded(self.buffers.memory),
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
            _pools.add(self)
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
                images = self.buffers.batch(images, len(labels))
            yield images, labels, bad
            del images

    def processes(self) -> list[Any]:
        """Return the worker processes that were started."""
        return getattr(self.loader._iterator, "_workers", [])

    def deaths(self) -> str:
        """Describe how worker processes died; empty if none did."""
        codes = [process.exitcode for process in self.processes()]
        return ", ".join(
            f"killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -9 else "")
            if code < 0 else f"exit code {code}"
            for code in codes if code
        )  # fmt: skip

    def end(self) -> None:
        """End the worker processes now.

        At the end of the program torch would send SIGTERM, which they ignore. The garbage
        collector would use queues of which parts may have been collected already.
        """
        _pools.discard(self)
        _kill(self.processes(), os.getpid())
        if self.workers and self.loader._iterator is not None:
            self.loader._iterator._shutdown_workers()  # type: ignore[attr-defined]


class _Orders:
    """The work of the current epoch: each task, with a buffer for its images."""

    def __init__(self, buffers: Buffers) -> None:
        self.buffers = buffers
        self.tasks: Iterable[Task] = ()

    def __iter__(self) -> Iterator[Order]:
        return ((*task, self.buffers.take()) for task in self.tasks)


_pools: weakref.WeakSet[WorkerPool] = weakref.WeakSet()
"""All pools that have worker processes."""


def _kill(workers: list[Any], owner: int) -> None:
    """Kill processes that only read and decode: they leave nothing half done."""
    if os.getpid() == owner:
        for worker in workers:
            worker.kill()


def _end_all() -> None:
    for pool in list(_pools):
        pool.end()


def _forget_pools() -> None:
    """In a forked process: see that the garbage collector does not end workers of the parent."""
    for pool in list(_pools):
        if pool.loader._iterator is not None:
            pool.loader._iterator._shutdown = True  # type: ignore[attr-defined]
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)


class Buffers:
    """Memory shared by all processes, cut into a buffer for each batch, and used again and again.

    New shared memory is slow: every page of it is zeroed first. A batch is a view of its buffer,
    not a copy, and the buffer is free again once nothing refers to the batch's memory. If batches
    are kept, later ones are copied out, so that every batch that was asked for has a buffer.
    """

    def __init__(self, workers: int, images: int, size: int) -> None:
        # One more: the next batch is asked for before the last one received is handed out.
        count = workers * PREFETCH + LENT + 1 if workers else 0
        shape = (count, images, 3, size, size)
        check_shared_memory(math.prod(shape), workers)
        self.memory = torch.empty(shape, dtype=torch.uint8).share_memory_()
        self.free, self.lent = list(range(count)), set[int]()

    def take(self) -> int | None:
        """Return the number of a free buffer; None where there are no worker processes."""
        return self.free.pop() if len(self.memory) else None

    def batch(self, buffer: int, count: int) -> Tensor:
        """Return the first `count` images in a buffer."""
        images = self.memory[buffer, :count]
        if len(self.lent) >= LENT:
            self.free.append(buffer)
            return images.clone()
        self.lent.add(buffer)
        array = images.numpy()  # Alive as long as the tensor made of it, or any view of that.
        weakref.finalize(array, self._give_back, buffer).atexit = False
        return torch.from_numpy(array)

    def _give_back(self, buffer: int) -> None:
        self.lent.discard(buffer)
        self.free.append(buffer)


def check_shared_memory(needed: int, workers: int) -> None:
    """Raise UsageError unless `needed` bytes fit into the memory that processes share.

    On Linux that is a separate file system, by default of 64 MB in a container. A process that
    touches memory there after it is full is killed (SIGBUS).
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
    """Start worker processes with stop signals blocked until they know to ignore them.

    Torch's handler of SIGCHLD is taken out again: when a worker died, it would raise an error in
    whatever this process is doing, such as writing a checkpoint. The loop that waits for batches
    notices a dead worker by itself.
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
    """Ignore stop signals: the process that trains saves first, and then ends this one."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def _as_it_is(result: Result) -> Result:
    """Collate nothing: each tensor made here would be sent in new shared memory."""
    return result
