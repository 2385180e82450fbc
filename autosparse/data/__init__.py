"""Where images come from: `load(DataConfig)` returns train, validation and test splits.

Every split yields batches of (uint8 images [B, C, H, W], int64 labels [B]) on its device;
`DataSource.prepare` augments and normalises a batch there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from autosparse.config import DataConfig
from autosparse.data.source import DataSource, Split, prepare
from autosparse.errors import UsageError, unknown

__all__ = ["DataSource", "Split", "load", "names", "prepare", "remembered"]


def _digits(config: DataConfig) -> DataSource:
    from autosparse.data.digits import load_digits

    return load_digits(config)


def _torchvision(config: DataConfig) -> DataSource:
    from autosparse.data.torchvision import load_torchvision

    return load_torchvision(config)


def _folder(config: DataConfig) -> DataSource:
    from autosparse.data.folder import load_folder

    return load_folder(config)


def _shards(config: DataConfig) -> DataSource:
    from autosparse.data.shards import load_shards

    return load_shards(config)


_LOADERS: dict[str, Callable[[DataConfig], DataSource]] = {
    "digits": _digits,
    "cifar10": _torchvision,
    "cifar100": _torchvision,
    "mnist": _torchvision,
    "fashion_mnist": _torchvision,
    "folder": _folder,
    "shards": _shards,
}


_REMEMBERED: dict[DataConfig, DataSource] | None = None


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
    return sorted(_LOADERS)


def load(config: DataConfig | str) -> DataSource:
    """Load a data set by its config or name; raise UsageError when it is unknown or not there."""
    if isinstance(config, str):
        config = DataConfig(name=config)
    if _REMEMBERED is not None and config in _REMEMBERED:
        return _REMEMBERED[config]
    if config.name not in _LOADERS:
        raise unknown("data set", config.name, names())
    if config.name in ("folder", "shards") and not config.root:
        raise UsageError(f"data.name {config.name} needs data.root, the folder to read")
    if not 0 < config.validation_fraction < 1:
        raise UsageError(
            f"data.validation_fraction must be in (0, 1): {config.validation_fraction}"
        )
    source = replace(_LOADERS[config.name](config), config=config)
    if _REMEMBERED is not None:
        _REMEMBERED[config] = source
    return source
