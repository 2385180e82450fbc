"""Decoding batches of samples, in worker processes or threads."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from autosparse.core.errors import UsageError
from autosparse.data import augment
from autosparse.data.decode import BadImage, decode, too_many
from autosparse.data.workers import Order, Result

BAD_IMAGES = "data.max_bad_images"
"""The setting that says how many images may be bad."""


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


class Decoder(Dataset):
    """Decodes whole batches, in a worker process or thread.

    Args:
        samples: the encoded images.
        size: side of the decoded ones.
        wanted: how training images are augmented.
        limit: how many bad images are allowed.
        replaced: whether neighbours stand in for bad images; otherwise these are left out.
        buffers: memory shared with the main process, [buffers, images, 3, size, size].
    """

    def __init__(
        self, samples: Samples, size: int, wanted: augment.Augmentation, limit: int,
        replaced: bool, buffers: Tensor,
    ) -> None:  # fmt: skip
        self.samples, self.size, self.wanted, self.limit = samples, size, wanted, limit
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
                raise too_many(f"{name}: {problem}", BAD_IMAGES, self.limit)
            if not self.replaced:
                return None
            number = self.samples.neighbour(number)
            if number == first:
                raise UsageError(f"{name}: {problem}; none of its neighbours can be decoded")

    def _augmented(self, content: bytes) -> Tensor:
        image = decode(content, self.size, augment.random_crop)
        if random.random() < 0.5:
            image = image.flip(2)
        if self.wanted.rand:
            image = augment.rand_augmented(image, self.wanted.rand)
        return image
