"""What many tests share: digits, tiny models, quick settings, and a quiet environment."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from autosparse import data, models
from autosparse.config import DataConfig, IRPConfig, ModelConfig, TrainingConfig
from autosparse.data import DataSource

QUICK = TrainingConfig(epochs=1, batch_size=100, checkpoint_epochs=0)
SMALL_DIGITS = DataConfig(train_limit=300)


@pytest.fixture(scope="session")
def digits() -> DataSource:
    return data.load(SMALL_DIGITS)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models are no slower on one thread, and do not wait for a second core that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(name: str = "test_byobnet", seed: int = 0, **options) -> nn.Module:
    """A tiny timm model for digits at 16 px."""
    if "vit" in name:
        options.setdefault("patch_size", 4)
    config = ModelConfig(name, options)
    return models.create(config, num_classes=10, in_chans=1, image_size=16, seed=seed)


def quick_irp(out: str, **changes) -> IRPConfig:
    """An IRP run of two levels that takes about a second."""
    settings = {
        "model": ModelConfig("test_byobnet"),
        "data": SMALL_DIGITS,
        "training": QUICK,
        "levels": 2,
        "final_density": 0.1,
        "device": "cpu",
    }
    return IRPConfig(**{**settings, "out": out, **changes})
