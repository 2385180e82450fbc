"""The order of samples: each once an epoch, the same for any ranks and workers, from any step."""

from __future__ import annotations

import io
from itertools import chain

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from autosparse.data.manifest import Shard
from autosparse.data.memory import MemorySplit
from autosparse.data.shards import ShardSamples
from autosparse.data.source import Split
from autosparse.data.stream import Stream


class Greys:
    """Samples of one grey each, in shards of a few."""

    def __init__(self, sizes: list[int], lanes: int) -> None:
        shards = [Shard(f"{n}.tar", "train", size, 0, "") for n, size in enumerate(sizes)]
        self.lain = ShardSamples(None, shards, 10, lanes)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.lain)

    def order(self, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        return self.lain.order(seed, epoch)

    def share(self, rank: int, world_size: int) -> list[int]:
        return self.lain.share(rank, world_size)

    def prepare(self, numbers: list[int]) -> None: ...

    def read(self, number: int) -> tuple[bytes, int]:
        stream = io.BytesIO()
        Image.new("L", (1, 1), number).save(stream, "PNG")
        return stream.getvalue(), number % 10


def split_of(kind: str, sizes: list[int], lanes: int, workers: int = 0) -> Split:
    greys = Greys(sizes, lanes)
    if kind == "stream":
        return Stream(greys, 1, workers)  # type: ignore[arg-type]
    numbers = torch.arange(len(greys))
    return MemorySplit(
        numbers.to(torch.uint8).view(-1, 1, 1, 1), numbers % 10,
        lanes=greys.order if kind == "lanes" else None,
    )  # fmt: skip


def numbers_of(batches) -> list[list[int]]:
    """Return which samples each batch holds; their labels must be theirs."""
    found = []
    for images, labels in batches:
        found.append(images[:, 0, 0, 0].tolist())
        assert labels.tolist() == [number % 10 for number in found[-1]]
    return found


KINDS = st.sampled_from(["memory", "lanes", "stream"])
SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@given(KINDS, SIZES, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5))
def test_an_epoch_has_each_sample_once_whatever_the_ranks(
    kind, sizes, lanes, batch_size, world_size, epoch
) -> None:
    split, total = split_of(kind, sizes, lanes), sum(sizes)
    together = batch_size * world_size
    ranks = [
        numbers_of(
            split.shuffled(batch_size, seed=3, epoch=epoch, rank=rank, world_size=world_size)
        )
        for rank in range(world_size)
    ]
    assert [len(batches) for batches in ranks] == [total // together] * world_size
    steps = [sorted(chain.from_iterable(parts)) for parts in zip(*ranks, strict=True)]
    seen = list(chain.from_iterable(steps))
    assert len(seen) == len(set(seen)) == total // together * together
    alone = numbers_of(split.shuffled(together, seed=3, epoch=epoch))
    assert [sorted(batch) for batch in alone] == steps


@given(KINDS, SIZES, st.integers(1, 4), st.integers(1, 4), st.data())
def test_an_epoch_goes_on_at_any_step(kind, sizes, lanes, batch_size, data) -> None:
    world_size = data.draw(st.integers(1, 2))
    split = split_of(kind, sizes, lanes)
    first = data.draw(st.integers(0, split.steps(batch_size, world_size)))
    for rank in range(world_size):
        place = {"seed": 1, "epoch": 2, "rank": rank, "world_size": world_size}
        whole = numbers_of(split.shuffled(batch_size, **place))
        again = split_of(kind, sizes, lanes)
        assert numbers_of(again.shuffled(batch_size, first=first, **place)) == whole[first:]


@given(KINDS, SIZES, st.integers(1, 4), st.integers(1, 4))
def test_an_evaluation_has_each_sample_once_over_all_ranks(
    kind, sizes, batch_size, world_size
) -> None:
    split = split_of(kind, sizes, 3)
    seen = [
        number
        for rank in range(world_size)
        for batch in numbers_of(split.once(batch_size, rank=rank, world_size=world_size))
        for number in batch
    ]
    assert sorted(seen) == list(range(sum(sizes)))


@settings(max_examples=5)
@given(SIZES, st.integers(1, 3), st.integers(1, 4))
def test_workers_change_nothing(sizes, workers, batch_size) -> None:
    place = {"seed": 0, "epoch": 1}
    alone = numbers_of(split_of("stream", sizes, 2).shuffled(batch_size, **place))
    shared = split_of("stream", sizes, 2, workers)
    assert numbers_of(shared.shuffled(batch_size, **place)) == alone
    for pool in shared.idle:  # type: ignore[attr-defined]
        pool.end()
