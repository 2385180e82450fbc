"""Settings of data, and of packing and indexing shards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from autosparse.core.config import local
from autosparse.data import identity as data_identity


def _root_identity(config: DataConfig) -> str | None:
    """Own data are known by their content, wherever they lie; named sets by their name."""
    return data_identity.content(config)


def _normalisation_identity(config: DataConfig) -> str | list[Any]:
    """Return what stands for auto in ids, so that earlier results of named sets keep theirs.

    Named sets were always measured. Own data once were measured or not by whether they fitted into
    memory: for them an id says which.
    """
    auto, other = ("imagenet", None) if config.name in data_identity.OWN else ("auto", "measured")
    return auto if config.normalisation in ("auto", other) else config.normalisation


@dataclass(frozen=True)
class DataConfig:
    """Where images come from, and how they are split."""

    name: str = "digits"
    """digits, a torchvision set (cifar10, cifar100, mnist, fashion_mnist), folder or shards."""
    root: str | None = field(default=None, metadata={"identity": _root_identity})
    """Folder of the data: required for folder and shards; torchvision sets download into it.

    For shards also one of the folder's tars, or a pattern such as DIR/train-{0000..0099}.tar.
    """
    image_size: int | None = None
    """Side of the square images in pixels; by default the usual one of the data set."""
    augment: str = "auto"
    """none, shift, shift+flip, shift+altflip (every other epoch each image is mirrored, in memory
    only), crop+flip (random resized crops, of streamed images), or auto.

    All but none and auto may be followed by timm's RandAugment: crop+flip+rand-m9-mstd0.5-inc1.
    """
    normalisation: list[list[float]] | list[float] | str = field(
        default="auto", metadata={"identity": _normalisation_identity}
    )
    """imagenet, measured (on the training images), or [mean, std], each a number or three, of 0..1.

    auto: imagenet for folder and shards, measured for the named sets.
    """
    validation_fraction: float = 0.15
    """Share of the training images held out for validation, stratified, the same every time."""
    train_limit: int | None = None
    """Use only this many training images, stratified, the same ones every time."""
    workers: int = local(2)
    """Processes per rank that decode images, for sets that are too large for memory."""
    memory_limit_gb: float = local(4.0)
    """Sets whose decoded images take less than this are held in memory as uint8 tensors.

    So are the images that streamed sets are scored on. It does not change any result.
    """
    lanes: int = 16
    """Lanes in which streamed shards are shuffled, best a multiple of the number of ranks."""
    max_bad_images: int = local(0)
    """How many undecodable images to tolerate. In training the next image stands in for each; in
    evaluation it is left out. One more stops the run."""
    allow_remote: bool = local(False)
    """Let data.root be a URL (http, https, gs, s3) that shards are fetched from."""
    cache: str = local("~/.cache/autosparse")
    """Folder for fetched shards, and for the hashes of the files of image folders."""


@dataclass(frozen=True)
class PackConfig:
    """How images are packed into shards."""

    resize: int | None = None
    """Shrink larger images to this many pixels on their shorter side; by default, keep them."""
    quality: int | None = None
    """Re-encode every image as JPEG at this quality. By default files are copied unchanged, and
    images shrunk by `resize` are saved at 90."""
    per_shard: int = 1000
    """Images per shard."""
    seed: int = 0
    """Fixes the order of the images."""
    validation_fraction: float = 0.15
    """Share of the training images that becomes validation, where there is none; stratified."""
    max_bad_images: int = local(0)
    """How many damaged or missing images to leave out before packing stops."""
    workers: int = local(2)
    """Processes that pack; with 1 it is this process."""
    root: str | None = local(None)
    """Folder of a torchvision set; by default AUTOSPARSE_DATA or data."""


@dataclass(frozen=True)
class IndexConfig:
    """How tars that others wrote are read."""

    label: str = "cls"
    """Extension of a sample's label, such as cls or txt, or json:KEY for an entry of its json."""
    dotted: bool = False
    """Keys hold dots: extensions begin at a name's last dot, not at its first as in WebDataset."""
    split: str | None = None
    """train, validation or test: the split of tars whose names hold none of these words."""
    classes: str | None = None
    """Number of classes, or a file with a class a line; by default the largest label + 1."""
    validation_fraction: float = 0.15
    """Share of the training tars that becomes validation, where there is none."""
