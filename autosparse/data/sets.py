"""`load(DataConfig)` returns a data set's train, validation and test splits.

Every split yields batches of (uint8 images [B, C, H, W], int64 labels [B]) on its device;
`DataSource.prepare` augments and normalises a batch there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from autosparse.core.errors import UsageError, unknown
from autosparse.core.ranges import check_ranges
from autosparse.data import identity, normalisation, remote
from autosparse.data.config import DataConfig
from autosparse.data.normalisation import prepare
from autosparse.data.source import DataSource, Split

__all__ = [
    "DataSource", "Shape", "Split", "check_config", "check_found", "if_there", "load", "names",
    "prepare", "remembered", "shape",
]  # fmt: skip


_REMEMBERED: dict[str, DataSource] | None = None
"""Keyed by the config's repr: a config holds lists, so it cannot be a key itself."""


@contextmanager
def remembered() -> Iterator[None]:
    """Load every data set once: inside, the same config gives the source that it gave before."""
    global _REMEMBERED
    before, _REMEMBERED = _REMEMBERED, {}
    try:
        yield
    finally:
        _REMEMBERED = before


def names() -> list[str]:
    """Return the names of the known data sets."""
    return sorted(_SETS)


@dataclass(frozen=True)
class Shape:
    """What a model must know of its data; None if it takes a look at the data to know."""

    num_classes: int | None
    in_chans: int
    image_size: int


_SETS = {
    "digits": ("digits", Shape(10, 1, 16)),
    "cifar10": ("torchvision", Shape(10, 3, 32)),
    "cifar100": ("torchvision", Shape(100, 3, 32)),
    "mnist": ("torchvision", Shape(10, 1, 28)),
    "fashion_mnist": ("torchvision", Shape(10, 1, 28)),
    "folder": ("folder", Shape(None, 3, 224)),
    "shards": ("shards", Shape(None, 3, 224)),
}
"""Name -> the module MODULE whose load_MODULE loads it, imported when asked for; its shape."""

RANGES = {
    "image_size": "whole and at least 1",
    "validation_fraction": "above 0 and below 1",
    "workers": "whole and at least 0",
    "memory_limit_gb": "at least 0",
    "lanes": "whole and at least 1",
    "max_bad_images": "whole and at least 0",
}


def shape(config: DataConfig) -> Shape:
    """Return what is known from the settings alone, without a look at the images."""
    check_config(config)
    usual = _SETS[config.name][1]
    return replace(usual, image_size=config.image_size or usual.image_size)


def check_config(config: DataConfig) -> None:
    """Raise UsageError for settings that cannot be, and where own data are not there."""
    if config.name not in _SETS:
        raise unknown("data set", config.name, names())
    if config.name in identity.OWN and not config.root:
        raise UsageError(f"data.name {config.name} needs data.root, the folder to read")
    check_ranges(config, RANGES, "data.")
    normalisation.check(config.normalisation)
    if config.name == "shards":
        remote.folder_of(config)
    elif config.name == "folder":
        identity.folder_root(config)


def load(config: DataConfig | str) -> DataSource:
    """Load a data set by its config or name; raise UsageError when it is unknown or not there."""
    if isinstance(config, str):
        config = DataConfig(name=config)
    if _REMEMBERED is not None and repr(config) in _REMEMBERED:
        return _REMEMBERED[repr(config)]
    check_config(config)
    module = _SETS[config.name][0]
    loader = getattr(import_module(f"autosparse.data.{module}"), f"load_{module}")
    source = replace(loader(config), config=config)
    source = normalisation.normalised(source, config)
    if _REMEMBERED is not None:
        _REMEMBERED[repr(config)] = source
    return source


def if_there(config: DataConfig) -> DataSource | None:
    """Load a set that is known by its name, unless it would have to be downloaded; else None."""
    if config.name not in _SETS or _SETS[config.name][0] != "torchvision":
        return None
    if _REMEMBERED is not None and repr(config) in _REMEMBERED:
        return _REMEMBERED[repr(config)]
    from autosparse.data.torchvision import is_there

    return load(config) if is_there(config) else None


def check_found(recorded: str | None, source: DataSource | None, where: Path) -> None:
    """Raise UsageError if finished work was made on other images than the set has now.

    Args:
        recorded: the data's fingerprint in the finished work; None if it holds none.
        source: the data set as it is now; None if it is not there. Data of one's own are not
            looked at: they are known by content, which made the name of the finished work.
        where: the finished work, for the message.
    """
    if source is None or source.config.name in identity.OWN:
        return
    if recorded not in (None, source.fingerprint):
        place = source.config.root or "where it is looked for"
        raise UsageError(
            f"{where} was made from different images (fingerprint {recorded}) than {source.name} "
            f"in {place} holds now ({source.fingerprint}); point data.root at the original images, "
            "or use another out"
        )
