"""Run by `deepspeed` on two ranks: write every step's loss of compact training, and its average."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

from autosparse import compact, prune
from autosparse.core.files import write_tensors
from autosparse.data import sets
from autosparse.integrations import deepspeed
from autosparse.sparsity import compact as compaction
from autosparse.sparsity import cpu_products
from autosparse.sparsity.compact import densify
from autosparse.study.config import DeepSpeedConfig, SparseTrainConfig
from tests.conftest import SMALL_DIGITS, make_model
from tests.integration.masked_dense import BATCH, CASES, STEPS, batches

FEW = 8
"""Steps that show that scattering at once gives the same bits."""


def main(out: Path) -> None:
    ranks, _ = deepspeed.start()
    source = sets.load(SMALL_DIGITS)
    losses = {}
    for name, case in CASES.items():
        ways = [(1, " sparse"), *((stage, how) for stage in range(4) for how in ("", " flat"))]
        for stage, how in ways:
            if (stage, how) == (3, " flat"):
                continue  # Parameters are only there while their layer is at work.
            many = how == " sparse"
            compaction.pays = (lambda kept, shape: kept > 0) if many else cpu_products.pays
            model = make_model(name, **case.options)
            compact(model, prune(model, source, "erk", case.sparsity))
            settings = replace(case.settings(), ema=0.0) if stage == 3 else case.settings()
            settings = replace(settings, scatter="flat" if how == " flat" else "auto")
            config = SparseTrainConfig(
                training=settings, deepspeed=DeepSpeedConfig(stage, case.accumulation)
            )
            stepper = deepspeed.DeepSpeedStepper(model, config, STEPS, ranks)
            stepper.model.train()
            half = BATCH // ranks.world_size
            mine = slice(ranks.rank * half, (ranks.rank + 1) * half)
            losses[f"{name} {stage}{how}"] = [
                float(stepper.step(images[mine], labels[mine]))
                for images, labels in islice(batches(source), FEW if how == " flat" else STEPS)
            ]
            if stepper.ema and ranks.rank == 0 and how != " flat":
                average = dict(densify(stepper.ema.module).named_parameters())
                write_tensors(out / f"{name} {stage}{how}.safetensors", average, {})
            stepper.close()
    (out / f"rank{ranks.rank}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
