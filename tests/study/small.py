"""Small studies, and results as if they had been trained."""

from __future__ import annotations

from pathlib import Path

from autosparse.core.files import write_json
from autosparse.models.config import ModelConfig
from autosparse.study.config import StudyConfig, SweepConfig
from autosparse.study.grid import StudyCell
from autosparse.study.trainings import RESULT
from tests.conftest import QUICK, SMALL_DIGITS


def comparison(out: Path, **changes) -> StudyConfig:
    settings = {
        "model": ModelConfig("test_byobnet"),
        "data": SMALL_DIGITS,
        "criteria": ["snip", "magnitude"],
        "sparsities": [0.5],
        "seeds": [0, 1],
        "training": QUICK,
        "device": "cpu",
        "tracking": False,
        "out": str(out),
    }
    return StudyConfig(**{**settings, **changes})


def sweep(out: Path, /, **changes) -> SweepConfig:
    settings = {
        "models": [ModelConfig("test_byobnet")],
        "data": SMALL_DIGITS,
        "criteria": ["snip", "magnitude"],
        "sparsities": [0.5, 0.8],
        "seeds": [0, 1],
        "training": QUICK,
        "tracking": False,
        "out": str(out),
    }
    return SweepConfig(**{**settings, **changes})


def result(cell: StudyCell, accuracy: float) -> None:
    """Write a cell's result as if it had been trained."""
    write_json(cell.folder / RESULT, {
        "name": cell.name, "seed": cell.seed, "test_accuracy": accuracy,
        "validation_accuracy": accuracy, "kept": 10, "parameters": 20, "checkpoint_bytes": 100,
        "seconds": 6.0, "prune_seconds": 0.0, "training_passes": 200, "image_passes": 0.0,
        "effective_density": None,
        "history": [{"epoch": 1, "validation_accuracy": accuracy}],
    })  # fmt: skip
