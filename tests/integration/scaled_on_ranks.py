"""Called on two ranks: the loss scale of fp16, lowered where gradients overflow, and resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from autosparse import compact, prune
from autosparse.core.errors import UsageError
from autosparse.data import sets
from autosparse.integrations import deepspeed
from autosparse.integrations.deepspeed_values import loss_scale, scaler_of
from autosparse.study.config import DeepSpeedConfig, SparseTrainConfig
from autosparse.training.steppers import History, Ranks
from tests.conftest import QUICK, SMALL_DIGITS, make_model

STEPS = 3


def scales(ranks: Ranks, folder: Path) -> tuple[list[float], list[int]]:
    """Return the scale after each of three steps that overflow, and resumed; and steps skipped."""
    source = sets.load(SMALL_DIGITS)
    ticket = prune(make_model(), source, "erk", 0.5)
    config = SparseTrainConfig(
        training=replace(QUICK, precision="fp16"), deepspeed=DeepSpeedConfig(zero_stage=0)
    )
    model, again = (compact(make_model(), ticket) for _ in range(2))
    stepper = deepspeed.DeepSpeedStepper(model, config, STEPS, ranks, folder)
    scaler = scaler_of(stepper.engine)
    assert scaler is not None
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**60})
    stepper.scale = 2.0**60
    stepper.model.train()
    images, labels = source.score_batches(2)[0]
    found = []
    for _ in range(STEPS):
        stepper.step(images, labels)
        found.append(loss_scale(stepper.engine))
    stepper.save(folder, History())
    resumed = deepspeed.DeepSpeedStepper(again, config, STEPS, ranks, folder)
    resumed.load(folder)
    found.append(loss_scale(resumed.engine))
    skipped = [stepper.skipped, resumed.skipped]
    stepper.close()
    resumed.close()
    return found, skipped


def refused(ranks: Ranks, precision: str, asked: list[DeepSpeedConfig]) -> list[str]:
    """Return what is said of each of the settings; nothing where it works."""
    said = []
    for each in asked:
        config = SparseTrainConfig(training=replace(QUICK, precision=precision), deepspeed=each)
        try:
            deepspeed.engine_config(config, ranks)
            said.append("")
        except UsageError as error:
            said.append(str(error))
    return said
