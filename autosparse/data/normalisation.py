"""`data.normalisation`: the mean and standard deviation that images are normalised by.

Named sets are measured: they are small. Own data take ImageNet's constants, as timm's transforms
and pretrained weights do by default. That needs no pass over the images, and a part of the data is
normalised like the whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autosparse.core.errors import UsageError
from autosparse.data import identity
from autosparse.data.config import DataConfig

if TYPE_CHECKING:
    from autosparse.data.source import DataSource, Split

Constants = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation of each channel, of pixels scaled to 0..1."""
IMAGENET: Constants = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MEASURED = 4096
"""Most images of own data that are measured, evenly spaced: the error of a mean is then about 1/64
of the standard deviation between images."""
PART = 64
"""Images that are measured at a time."""


def check(wanted: Any) -> None:
    """Raise UsageError unless this is a valid `data.normalisation`."""
    if isinstance(wanted, str) and wanted in ("auto", "imagenet", "measured"):
        return
    pair = wanted if isinstance(wanted, list | tuple) and len(wanted) == 2 else None
    numbers = [_numbers(each) for each in pair] if pair else []
    if not numbers or not all(numbers) or min(numbers[1]) <= 0:
        raise UsageError(
            "data.normalisation must be auto, imagenet, measured, or [mean, std], each a number or "
            f"one a channel, std above 0: {wanted!r}"
        )


def _numbers(value: Any) -> tuple[float, ...]:
    """Return the numbers of a list, or one that is alone; none where something else is given."""
    numbers = value if isinstance(value, list | tuple) else [value]
    wrong = any(isinstance(each, bool) or not isinstance(each, int | float) for each in numbers)
    return () if wrong else tuple(map(float, numbers))


def normalised(source: DataSource, config: DataConfig) -> DataSource:
    """Return the source normalised as `data.normalisation` asks.

    Loaders return named sets measured, and own data with ImageNet's constants.
    """
    wanted, own = config.normalisation, config.name in identity.OWN
    if wanted in ("auto", "imagenet" if own else "measured"):
        return source
    if wanted == "measured":
        mean, std = measured(source.train, source.in_chans)
    elif wanted == "imagenet":
        mean, std = imagenet(source.in_chans)
    else:
        mean, std = (_of_channels(each, source.in_chans) for each in wanted)
    return replace(source, mean=mean, std=std)


def imagenet(channels: int) -> Constants:
    """Return ImageNet's constants; of grey images the means of the three channels'."""
    if channels == 3:
        return IMAGENET
    mean, std = (round(sum(each) / 3, 3) for each in IMAGENET)
    return (mean,) * channels, (std,) * channels


def _of_channels(value: Any, channels: int) -> tuple[float, ...]:
    numbers = _numbers(value)
    if len(numbers) not in (1, channels):
        raise UsageError(
            f"data.normalisation has {len(numbers)} values for images of {channels} channels"
        )
    return numbers * (channels if len(numbers) == 1 else 1)


def measured(train: Split, channels: int) -> Constants:
    """Measure `MEASURED` evenly spaced training images (all, if there are no more)."""
    count = min(len(train), MEASURED)
    numbers = [place * len(train) // count for place in range(count)]
    parts = [numbers[start : start + PART] for start in range(0, count, PART)]
    return statistics((images for images, _ in train.plain().chosen(parts)), channels)


def statistics(batches: Iterable[Tensor], channels: int) -> Constants:
    """Return mean and standard deviation per channel of uint8 images [B, C, H, W], in 0..1.

    They come from exact counts of the values, so they do not depend on how images are batched.
    """
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    for images in batches:
        for channel in range(channels):
            counts[channel] += torch.bincount(images[:, channel].flatten().cpu(), minlength=256)
    values = torch.arange(256, dtype=torch.float64) / 255
    total = counts.sum(1).double()
    mean = counts.double() @ values / total
    squares = (counts.double() * (values - mean[:, None]) ** 2).sum(1)
    std = (squares / (total - 1)).sqrt().clamp(min=1e-3)
    return tuple(mean.tolist()), tuple(std.tolist())


def prepare(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Scale uint8 images [B, C, H, W] to 0..1 and normalise each channel."""
    dtype = torch.get_default_dtype()
    shift, scale = (_per_channel(each, images.device, dtype) for each in (mean, std))
    return (images - shift) / scale


@lru_cache(maxsize=64)
def _per_channel(numbers: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return numbers [C] times 255 as [C, 1, 1], cached: a copy each step would hold up a GPU."""
    return torch.tensor(numbers, dtype=dtype).view(-1, 1, 1).mul(255).to(device)
