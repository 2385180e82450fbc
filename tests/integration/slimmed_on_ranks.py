"""Called on two ranks: train a ticket under DeepSpeed, with units that nobody reads or without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from autosparse.data import sets
from autosparse.integrations.deepspeed import DeepSpeedStepper
from autosparse.study.cells import cells
from autosparse.study.config import DeepSpeedConfig, SparseTrainConfig
from autosparse.study.trainings import TRAINED, train_cell
from autosparse.training.steppers import Ranks
from tests.conftest import QUICK, SMALL_DIGITS

SGD = {"optimizer": "sgd", "learning_rate": 0.05, "optimizer_options": {"momentum": 0.9}}
"""No step is made of rounding noise, as Adam's are where a gradient should be zero."""


def slimmed(ranks: Ranks, ticket: Path, out: Path, stage: int, slim: bool) -> tuple[Path, int]:
    """Return the trained ticket's file, and how many parameters were trained."""
    config = SparseTrainConfig(
        tickets=str(ticket), training=replace(QUICK, slim=slim, clip_grad=1.0, **SGD),
        deepspeed=DeepSpeedConfig(stage), out=str(out),
    )  # fmt: skip
    (cell,) = cells(config, ranks=ranks)
    made: list[DeepSpeedStepper] = []

    def make(model, steps: int) -> DeepSpeedStepper:
        made.append(DeepSpeedStepper(model, config, steps, ranks, cell.folder))
        return made[0]

    result = train_cell(cell, config, sets.load(SMALL_DIGITS), make, device="cpu", ranks=ranks)
    made[0].close()
    return cell.folder / TRAINED, result["parameters"]
