"""Where images come from: `load(DataConfig)` returns train, validation and test splits.

Every split yields batches of (uint8 images [B, C, H, W], int64 labels [B]) on its device;
`DataSource.prepare` augments and normalises a batch there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from autosparse.config import OWN_DATA, DataConfig
from autosparse.data import normalisation
from autosparse.data.source import DataSource, Split, prepare
from autosparse.errors import UsageError, unknown

__all__ = ["DataSource", "Split", "load", "names", "prepare"]


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


def names() -> list[str]:
    """Return the names of the known data sets."""
    return sorted(_LOADERS)


def load(config: DataConfig | str) -> DataSource:
    """Load a data set by its config or name; raise UsageError when it is unknown or not there."""
    if isinstance(config, str):
        config = DataConfig(name=config)
    if config.name not in _LOADERS:
        raise unknown("data set", config.name, names())
    if config.name in OWN_DATA and not config.root:
        raise UsageError(f"data.name {config.name} needs data.root, the folder to read")
    if not 0 < config.validation_fraction < 1:
        raise UsageError(
            f"data.validation_fraction must be in (0, 1): {config.validation_fraction}"
        )
    normalisation.check(config.normalisation)
    source = replace(_LOADERS[config.name](config), config=config)
    return normalisation.normalised(source, config)
