"""Called on ranks: evaluate one model under bf16, in plain PyTorch and in DeepSpeed's engine."""

from __future__ import annotations

from dataclasses import replace

from autosparse import compact, prune
from autosparse.data import sets
from autosparse.integrations import deepspeed
from autosparse.study.config import DeepSpeedConfig, SparseTrainConfig
from autosparse.training.loop import evaluate
from autosparse.training.steppers import PlainStepper, Ranks
from tests.conftest import QUICK, SMALL_DIGITS, make_model

STEPS = 3


def evaluations(ranks: Ranks) -> dict[str, list[dict[str, float]]]:
    """Return for each precision and share of the moving average what the two find."""
    source = sets.load(SMALL_DIGITS)
    ticket = prune(make_model("test_vit"), source, "erk", 0.5)
    found = {}
    for precision in ("fp32", "bf16"):
        for ema in (0.0, 0.5):
            training = replace(QUICK, precision=precision, ema=ema)
            config = SparseTrainConfig(training=training, deepspeed=DeepSpeedConfig(1))
            mine, theirs = (compact(make_model("test_vit"), ticket) for _ in range(2))
            plain = PlainStepper(mine, training, STEPS)
            engine = deepspeed.DeepSpeedStepper(theirs, config, STEPS, ranks)
            found[f"{precision} {ema}"] = [
                vars(evaluate(each.evaluated(), source, source.test, ranks, training))
                for each in (plain, engine)
            ]
            engine.close()
    return found
