"""Streamed splits, for data too large for memory: worker processes decode whole batches.

The order of the samples is worked out before they are dealt out, so it depends neither on the
number of workers nor, for the same global batch, on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autosparse.core.errors import RunFailed, UsageError
from autosparse.core.memory import keep_freed_blocks
from autosparse.data import augment
from autosparse.data.augment import sent
from autosparse.data.config import DataConfig
from autosparse.data.decode import count_bad
from autosparse.data.decoder import BAD_IMAGES, Decoder, Samples
from autosparse.data.manifest import SPLITS
from autosparse.data.memory import MemorySplit, in_memory
from autosparse.data.normalisation import IMAGENET
from autosparse.data.source import Batch, DataSource
from autosparse.data.workers import Task, WorkerPool

DEFAULT_SIZE = 224
"""Side of images in pixels: ImageNet's usual one."""
CHUNK = 64
"""Images that a thread decodes in one go, for a split held in memory."""
BadImages = dict[str, str]
"""Name of a sample -> what is wrong with its image."""


@dataclass(frozen=True)
class Stream:
    """A split whose images are read and decoded as they are needed."""

    samples: Samples
    size: int
    workers: int = 0
    augment: str = "none"
    max_bad_images: int = 0
    bad: BadImages = field(default_factory=dict)
    """Bad images so far; shared by the splits of a source."""
    device: torch.device = torch.device("cpu")
    idle: list[WorkerPool] = field(default_factory=list, repr=False, compare=False)
    """The worker pool that has finished an epoch and waits for the next; at most one."""

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
        pool = self.idle.pop() if self.idle else None
        if pool is not None and (pool.workers, pool.largest) != (workers, batch_size):
            pool.end()
            pool = None
        pool = pool or self._pool(workers, batch_size, replaced=True)
        yield from self._batches(pool, tasks())
        if not self.idle:
            self.idle.append(pool)
        else:
            pool.end()

    def once(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        numbers = self.samples.share(rank, world_size)
        starts = range(0, len(numbers), batch_size)
        yield from self.chosen([numbers[start : start + batch_size] for start in starts])

    def chosen(self, parts: Sequence[list[int]]) -> Iterator[Batch]:
        pool = self._pool(
            min(self.workers, len(parts)), max(map(len, parts), default=0), replaced=False
        )
        yield from self._batches(pool, ((part, None) for part in parts))
        pool.end()

    def _pool(self, workers: int, largest: int, *, replaced: bool) -> WorkerPool:
        return WorkerPool(partial(self._decoder, replaced), workers, largest, self.size)

    def _decoder(self, replaced: bool, buffers: Tensor) -> Decoder:
        wanted = augment.parse(self.augment)
        return Decoder(self.samples, self.size, wanted, self.max_bad_images, replaced, buffers)

    def _batches(self, pool: WorkerPool, tasks: Iterable[Task]) -> Iterator[Batch]:
        """Yield a batch for each task, unless all its images are bad.

        The pool is kept at the end; it is ended if the loop stops early.
        """
        if self.device.type == "cpu":
            keep_freed_blocks()
        whole = False
        try:
            for images, labels, bad in pool.work(tasks):
                self._count(bad)
                if labels:
                    yield sent(images, self.device), sent(torch.tensor(labels), self.device)
                del images
            whole = True
        except UsageError as error:
            raise _first_cause(error) from error
        except (RuntimeError, EOFError, ConnectionError) as error:
            dead = pool.deaths()
            if not dead:
                raise
            raise RunFailed(f"a process that decodes images died: {dead}") from error
        finally:
            if not whole:
                pool.end()

    def _count(self, bad: list[tuple[str, str]]) -> None:
        for name, problem in bad:
            if name not in self.bad:
                self.bad[name] = problem
                count_bad(f"{name}: {problem}", BAD_IMAGES, len(self.bad), self.max_bad_images)

    def in_memory(self, *, replaced: bool = False) -> MemorySplit:
        """Decode the whole split by threads; neighbours stand in for bad images if `replaced`."""
        images = torch.empty((len(self), 3, self.size, self.size), dtype=torch.uint8)
        decoder = replace(self, augment="none")._decoder(replaced, torch.empty(0))
        labels: list[int] = []
        rows: list[int] = []

        def parts() -> Iterator[range]:
            for start in range(0, len(self), CHUNK):
                part = range(start, min(start + CHUNK, len(self)))
                self.samples.prepare(list(part))  # Here: several threads would do the same.
                yield part

        def decoded(part: range) -> tuple[range, list[int], list[tuple[str, str]]]:
            _, good, bad = decoder.decoded(list(part), images[part.start : part.stop])
            return part[: len(good)], good, bad

        with ThreadPoolExecutor() as threads:
            for part, good, bad in threads.map(decoded, parts()):
                self._count(bad)
                labels += good
                rows += part
        kept = images if len(rows) == len(self) else images[rows]
        order = self.samples.order if replaced else None
        return MemorySplit(kept, torch.tensor(labels, dtype=torch.int64), order)

    def plain(self) -> Stream:
        return replace(self, augment="none", idle=[])

    def to(self, device: torch.device) -> Stream:
        return replace(self, device=device)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "idle": []}


def _first_cause(error: Exception) -> UsageError:
    """Return a worker process's UsageError without the traceback that DataLoader wraps it in."""
    last = str(error).strip().splitlines()[-1]
    return UsageError(last.removeprefix("autosparse.core.errors.UsageError: "))


def own_data(
    name: str,
    samples: Mapping[str, Samples],
    classes: int,
    config: DataConfig,
    fingerprint: Callable[[], str],
) -> DataSource:
    """Return a folder or shards as a source: in memory if the decoded images fit, else streamed.

    Args:
        name: of the data.
        samples: of train, validation and test; in memory, validation may be empty.
        classes: how many there are.
        config: settings of the data.
        fingerprint: returns that of streamed data.
    """
    size = config.image_size or DEFAULT_SIZE
    needed = 3 * size * size * sum(map(len, samples.values()))
    streamed = needed > config.memory_limit_gb * 1e9
    if streamed and not len(samples["validation"]):
        raise UsageError(f"{config.root} is too large for memory and has no validation shards")
    if streamed and (config.train_limit or len(samples["train"])) < len(samples["train"]):
        raise UsageError(f"data.train_limit works in memory only; {config.root} is streamed")
    chosen = augment.choose(config.augment, "shift+flip", streamed=streamed)
    bad: BadImages = {}
    splits = {
        split: Stream(
            samples[split],
            size,
            config.workers,
            chosen if split == "train" else "none",
            config.max_bad_images,
            bad,
        )
        for split in SPLITS
    }
    if streamed:
        mean, std = IMAGENET
        return DataSource(
            name, splits["train"], splits["validation"], splits["test"], classes, 3, size,
            mean, std, chosen, fingerprint(),
        )  # fmt: skip
    return in_memory(
        name,
        splits["train"].in_memory(replaced=True),
        splits["test"].in_memory(),
        config,
        validation=splits["validation"].in_memory() if len(samples["validation"]) else None,
        num_classes=classes,
        augment=chosen,
        normalisation=IMAGENET,
    )
