"""torchvision's sets: read from `data.root`, or downloaded into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from autosparse.core.errors import UsageError
from autosparse.data.augment import choose
from autosparse.data.config import DataConfig
from autosparse.data.memory import MemorySplit, in_memory, resized
from autosparse.data.source import DataSource

SETS = {
    "cifar10": ("CIFAR10", 10, "shift+flip"),
    "cifar100": ("CIFAR100", 100, "shift+flip"),
    "mnist": ("MNIST", 10, "shift"),
    "fashion_mnist": ("FashionMNIST", 10, "shift+flip"),
}
"""Ours -> torchvision's class, number of classes, suitable augmentation."""


def _root(config: DataConfig) -> Path:
    return Path(config.root or os.environ.get("AUTOSPARSE_DATA", "data")).expanduser()


def _dataset(config: DataConfig, *, train: bool, download: bool = False) -> Any:
    from torchvision import datasets

    kind = getattr(datasets, SETS[config.name][0])
    return kind(_root(config), train=train, download=download)


def class_names(config: DataConfig) -> list[str]:
    """Return the classes of a set that has been loaded before."""
    return [str(name) for name in _dataset(config, train=False).classes]


def is_there(config: DataConfig) -> bool:
    """Return whether a set's files are there, so that nothing would be downloaded."""
    try:
        _dataset(config, train=True)
    except RuntimeError:
        return False
    except (ValueError, AssertionError, EOFError):  # Damaged; `load_torchvision` reports it.
        return True
    return True


def load_torchvision(config: DataConfig) -> DataSource:
    """Return a torchvision set at its own size unless `image_size` is set."""
    _, num_classes, suitable = SETS[config.name]
    train, test = (_split(config, train) for train in (True, False))
    return in_memory(
        config.name,
        train,
        test,
        config,
        num_classes=num_classes,
        augment=choose(config.augment, suitable),
    )


def _split(config: DataConfig, train: bool) -> MemorySplit:
    kind, root = SETS[config.name][0], _root(config)
    try:
        dataset = _dataset(config, train=train)
    except (RuntimeError, ValueError, AssertionError, EOFError):
        with _alone(root):  # Another process may be downloading it just now.
            dataset = _fetched(config, train)
    if len(dataset.data) != len(dataset.targets):
        raise UsageError(
            f"{kind} in {root} has {len(dataset.data)} images and {len(dataset.targets)} labels"
        )
    pixels = torch.as_tensor(np.asarray(dataset.data))
    images = pixels.permute(0, 3, 1, 2) if pixels.ndim == 4 else pixels[:, None]
    labels = torch.as_tensor(dataset.targets).long()
    return MemorySplit(resized(images.contiguous(), config.image_size or images.shape[-1]), labels)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Keep other processes from downloading into the folder; where it is read-only, none does."""
    lock = FileLock(root / ".download.lock")
    with suppress(OSError, NotImplementedError):
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetched(config: DataConfig, train: bool) -> Any:
    kind, root = SETS[config.name][0], _root(config)
    try:
        return _dataset(config, train=train)
    except (ValueError, AssertionError, EOFError) as error:
        raise UsageError(
            f"{kind} in {root} is damaged ({error}); remove it and start again"
        ) from error
    except RuntimeError:
        try:
            return _dataset(config, train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise UsageError(
                f"{kind} is not in {root} and could not be downloaded ({error}); "
                "set data.root to a folder that holds it"
            ) from error
