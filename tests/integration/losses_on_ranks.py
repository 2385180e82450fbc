"""Called on two ranks: train compact weights under DeepSpeed, return every step's loss."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
from torch import Tensor

from autosparse import compact, prune
from autosparse.data import sets
from autosparse.integrations import deepspeed
from autosparse.sparsity import compact as compaction
from autosparse.sparsity.compact import densify
from autosparse.study.config import DeepSpeedConfig, SparseTrainConfig
from autosparse.training.steppers import Ranks
from tests.conftest import SMALL_DIGITS, make_model
from tests.integration.masked_dense import BATCH, CASES, STEPS, batches


def losses(
    ranks: Ranks, name: str, stage: int, how: str, steps: int
) -> tuple[list[float], dict[str, Tensor]]:
    """Return this rank's losses and the moving average of all weights (none under ZeRO 3).

    `how`: "auto", "flat" (all weights are scattered at once) or "sparse" (products of sparse
    matrices for all layers that can).
    """
    case, source = CASES[name], sets.load(SMALL_DIGITS)
    with pytest.MonkeyPatch.context() as patch:
        if how == "sparse":
            patch.setattr(compaction, "pays", lambda kept, shape: kept > 0)
        model = make_model(name, **case.options)
        compact(model, prune(model, source, "erk", case.sparsity))
    settings = replace(case.settings(), scatter="flat" if how == "flat" else "auto")
    settings = replace(settings, ema=0.0) if stage == 3 else settings
    config = SparseTrainConfig(
        training=settings, deepspeed=DeepSpeedConfig(stage, case.accumulation)
    )
    stepper = deepspeed.DeepSpeedStepper(model, config, STEPS, ranks)
    stepper.model.train()
    half = BATCH // ranks.world_size
    mine = slice(ranks.rank * half, (ranks.rank + 1) * half)
    found = [
        float(stepper.step(images[mine], labels[mine]))
        for images, labels in islice(batches(source), steps)
    ]
    average = densify(stepper.ema.module).named_parameters() if stepper.ema else ()
    weights = {key: value.detach().clone() for key, value in average}
    stepper.close()
    return found, weights
