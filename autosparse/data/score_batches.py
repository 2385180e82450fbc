"""Balanced batches for scoring: chosen by the labels, decoded when they are iterated over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autosparse.data.splitting import warn_of_empty

if TYPE_CHECKING:
    from autosparse.data.source import Batch, DataSource


def choose(labels: Tensor, order: Tensor, classes: int, each: int, batches: int) -> list[list[int]]:
    """Return the samples of every balanced batch: the first of each class in an order.

    The first `each` of a class go into the first batch, the next ones into the second, and so on;
    inside a batch they keep the order.

    Args:
        labels: of all samples [N].
        order: the samples, in the order in which they are taken.
        classes: number of classes.
        each: samples of a class in a batch.
        batches: how many.
    """
    in_order = labels[order]
    counts = torch.bincount(in_order, minlength=classes)
    by_class = in_order.argsort(stable=True)
    class_starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    earlier = torch.empty_like(by_class)
    """Of each sample: how many of its class come before it."""
    earlier[by_class] = torch.arange(len(in_order)) - class_starts
    batch_of = earlier // each
    return [order[batch_of == batch].tolist() for batch in range(batches)]


class ScoreBatches(Sequence["Batch"]):
    """Normalised batches, computed anew in each iteration, so that only one is held as floats.

    If all images of this rank fit into `data.memory_limit_gb` as uint8, they are decoded once and
    kept; otherwise each iteration decodes them.
    """

    def __init__(self, source: DataSource, parts: list[list[int]]) -> None:
        self.source, self.parts = source, parts
        self._split = source.train.plain()
        side = source.image_size
        needed = source.in_chans * side * side * sum(map(len, parts))
        self._keeps = needed <= source.config.memory_limit_gb * 1e9
        self._kept: list[Batch] | None = None

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Batch]:
        if self._kept is None and self._keeps:
            self._kept = list(self._split.chosen(self.parts))
        batches = self._split.chosen(self.parts) if self._kept is None else self._kept
        for images, labels in batches:
            yield self.source.prepare(images), labels

    def __getitem__(self, place: Any) -> Any:
        chosen = self.parts[place]
        if isinstance(place, slice):
            return ScoreBatches(self.source, self.parts[place])
        return next(iter(ScoreBatches(self.source, [chosen])))


def balanced(
    source: DataSource, samples_per_class: int, seed: int, batches: int
) -> list[list[int]]:
    """Return the numbers of the training images of every balanced batch; see `score_batches`."""
    labels = source.train.labels.cpu()
    warn_of_empty(labels, map(str, range(source.num_classes)), f"{source.name}, training images")
    order = source.train.order(seed, 0)
    return choose(labels, order, source.num_classes, samples_per_class, batches)
