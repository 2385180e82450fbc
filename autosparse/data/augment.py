"""`data.augment`: shifts and flips of whole batches, random crops while decoding, RandAugment.

A RandAugment such as `rand-m9-mstd0.5-inc1` may follow after a plus: magnitude 9, with noise of
standard deviation 0.5, and operations that get stronger with the magnitude. Source: Cubuk et al.,
RandAugment (NeurIPS 2020), arXiv 1909.13719, as timm has it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autosparse.core.errors import UsageError

AUGMENTS = ("none", "shift", "shift+flip", "shift+altflip", "crop+flip")
"""Each but none may be followed by +rand-…; crop+flip is for streamed sets."""
CROP_AREA, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
"""Share of the image's area, and width / height, of a random resized crop: timm's defaults."""


@dataclass(frozen=True)
class Augmentation:
    """The parts of a value of `data.augment`."""

    shift: bool = False
    crop: bool = False
    flip: bool = False
    alternating: bool = False
    """Mirror every image in every other epoch; see `memory.mirrored`."""
    rand: str | None = None


@lru_cache
def parse(text: str) -> Augmentation:
    """Parse `data.augment`; raise UsageError for an unknown value."""
    base, plus, rand = text.partition("+rand")
    if base not in AUGMENTS or (plus and base == "none"):
        raise UsageError(
            f"data.augment must be auto or one of {', '.join(AUGMENTS)}, all but none also with "
            f"timm's RandAugment, such as crop+flip+rand-m9-mstd0.5-inc1: {text!r}"
        )
    if plus:
        rand_augment(f"rand{rand}", 32)
    return Augmentation(
        base.startswith("shift"),
        base.startswith("crop"),
        base.endswith("+flip"),
        base.endswith("+altflip"),
        f"rand{rand}" if plus else None,
    )


def choose(asked: str, suitable: str, *, streamed: bool = False) -> str:
    """Resolve `data.augment`: auto is `suitable`.

    Raises UsageError for what only streamed images can have, or only images in memory.
    """
    if asked == "auto":
        return suitable
    if parse(asked).alternating and streamed:
        raise UsageError(
            f"data.augment {asked} is for images held in memory (data.memory_limit_gb); use "
            "crop+flip"
        )
    if parse(asked).crop and not streamed:
        raise UsageError(
            f"data.augment {asked} is for streamed images: set data.memory_limit_gb to 0 to stream "
            "them, or use shift+flip"
        )
    return asked


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device; the copy to a GPU does not block."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def augmented(images: Tensor, wanted: Augmentation, generator: torch.Generator) -> Tensor:
    """Return a batch of uint8 images [B, C, H, W], shifted, flipped, and after RandAugment.

    A shift is of up to 1/8 of the side, edges repeated; a flip mirrors half of the images. All that
    is random comes from a CPU generator.
    """
    if not wanted.shift:
        return images
    offsets, mirror, seeds = draws(len(images), images.shape[-2], wanted, generator)
    images = _shifted(images, offsets, mirror & wanted.flip)
    return rand_augmented_batch(images, wanted.rand, seeds) if wanted.rand else images


def draws(
    count: int, side: int, wanted: Augmentation, generator: torch.Generator
) -> tuple[Tensor, Tensor, list[int]]:
    """Draw offsets [2, count, 1], whether to mirror [count, 1], and RandAugment's seeds."""
    if not wanted.shift:
        return torch.empty(0), torch.empty(0), []
    reach = max(1, side // 8)
    offsets = torch.randint(-reach, reach + 1, (2, count, 1), generator=generator)
    mirror = torch.randint(0, 2, (count, 1), generator=generator).bool()
    seeds = torch.randint(2**31, (count,), generator=generator).tolist() if wanted.rand else []
    return offsets, mirror, seeds


def _shifted(images: Tensor, offsets: Tensor, mirror: Tensor) -> Tensor:
    """Shift and mirror a batch, by one gather on its device."""
    count, channels, height, width = images.shape
    device = images.device
    down, right, mirror = sent(torch.stack([*offsets, mirror]), device)
    rows = (torch.arange(height, device=device) + down).clamp(0, height - 1)
    columns = (torch.arange(width, device=device) + right).clamp(0, width - 1)
    columns = torch.where(mirror.bool(), columns.flip(1), columns)
    flat = (rows[:, :, None] * width + columns[:, None, :]).view(count, 1, -1)
    index = flat.expand(count, channels, height * width)
    return images.flatten(2).gather(2, index).view_as(images)


@lru_cache
def rand_augment(text: str, size: int) -> Callable[[Any], Any]:
    """Return timm's RandAugment for PIL images of side `size`.

    As in timm's own transforms, it moves images by up to 0.45 of the side, and fills gaps with
    ImageNet's mean.
    """
    from timm.data.auto_augment import rand_augment_transform

    try:
        return rand_augment_transform(
            text, {"translate_const": int(size * 0.45), "img_mean": (124, 116, 104)}
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise UsageError(f"data.augment: timm does not know {text!r} ({error})") from None


@contextmanager
def python_rng() -> Iterator[Callable[..., None]]:
    """Yield a function that seeds Python's and NumPy's RNGs, which timm draws from.

    It takes any integers: a seed, or a seed, an epoch and a sample. Both RNGs are restored after.
    """

    def seed(*numbers: int) -> None:
        random.seed(repr(numbers))
        np.random.seed(random.getrandbits(32))

    kept = random.getstate(), np.random.get_state()
    try:
        yield seed
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])


def random_crop(height: int, width: int) -> tuple[int, int, int, int]:
    """Draw top, left, height and width of a random resized crop from Python's RNG."""
    from timm.data.transforms import RandomResizedCropAndInterpolation

    image = torch.empty(1, height, width, device="meta")
    top, left, tall, wide = RandomResizedCropAndInterpolation.get_params(
        image, CROP_AREA, CROP_RATIO
    )
    return top, left, tall, wide


def rand_augmented(image: Tensor, text: str) -> Tensor:
    """Return a uint8 image [C, H, W] of 1 or 3 channels after RandAugment, from Python's RNG."""
    from PIL import Image

    channels, size = image.shape[0], image.shape[1]
    if channels not in (1, 3):
        raise UsageError(f"RandAugment takes images of 1 or 3 channels, not {channels}")
    picture = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
    changed = np.array(rand_augment(text, size)(picture).convert("RGB" if channels == 3 else "L"))
    return torch.from_numpy(changed).view(size, -1, channels).permute(2, 0, 1)


def rand_augmented_batch(images: Tensor, text: str, seeds: list[int]) -> Tensor:
    """Apply RandAugment to every image [B, C, H, W], each from its own seed."""
    augmented = []
    with python_rng() as seed:
        for image, number in zip(images.cpu(), seeds, strict=True):
            seed(number)
            augmented.append(rand_augmented(image, text))
    return sent(torch.stack(augmented), images.device)
