"""Run by `deepspeed` on two ranks: losses and masks of topologies that move, by ZeRO stage."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from autosparse import compact, prune
from autosparse.core.files import write_tensors
from autosparse.data import sets
from autosparse.integrations import deepspeed
from autosparse.integrations.deepspeed_values import KeptSharded
from autosparse.sparsity.compact import compact_weights
from autosparse.study.config import DeepSpeedConfig, SparseTrainConfig
from autosparse.training.steppers import History
from tests.conftest import SMALL_DIGITS, make_model
from tests.integration.masked_dense import BATCH, CASES, batches

UPDATES, EVERY = 3, 3
STEPS = UPDATES * EVERY + 1
WAYS: dict[str, dict[str, Any]] = {
    "0": {}, "1": {}, "2": {}, "3": {},
    "1 flat": {"scatter": "flat"}, "0 rescatter": {"rescatter": True},
    "3 rescatter": {"rescatter": True}, "1 bf16": {"precision": "bf16"},
}  # fmt: skip
SGD = {"optimizer": "momentum", "learning_rate": 0.02, "optimizer_options": {}}
WAYS |= {
    f"{stage} {wrapper}": {**SGD, "topology": "set", "optimizer_wrapper": wrapper}
    for stage in range(4) for wrapper in ("none", "ham", "sign_in", "sparseopt")
}  # fmt: skip


def settings(name: str, **changes: Any) -> SparseTrainConfig:
    """Return how a case is trained; `masked_rigl` takes the same training config."""
    case = CASES[name]
    changes = {"topology": "rigl", **changes}
    training = replace(
        case.settings(), ema=0.0, epochs=1, sparse_products=False,
        topology_every=EVERY, topology_until=1.0, **changes,
    )  # fmt: skip
    return SparseTrainConfig(training=training, deepspeed=DeepSpeedConfig(0, case.accumulation))


class Run:
    """One training on this rank."""

    def __init__(self, name: str, config: SparseTrainConfig, ranks: Any, source: Any, folder=None):
        case = CASES[name]
        self.model = make_model(name, **case.options)
        compact(self.model, prune(self.model, source, "erk", case.sparsity))
        self.stepper = deepspeed.DeepSpeedStepper(self.model, config, STEPS, ranks, folder)
        self.stepper.model.train()
        half = BATCH // ranks.world_size
        mine = slice(ranks.rank * half, (ranks.rank + 1) * half)
        self.data = [(images[mine], labels[mine]) for images, labels in self.batches(source)]

    @staticmethod
    def batches(source: Any) -> list[tuple[Tensor, Tensor]]:
        return [each for each, _ in zip(batches(source), range(STEPS), strict=False)]

    def steps(self, first: int, last: int) -> list[float]:
        return [float(self.stepper.step(*each)) for each in self.data[first:last]]

    def masks(self) -> dict[str, Tensor]:
        return {name: weight.mask() for name, weight in compact_weights(self.model)}

    def moments(self) -> dict[str, Tensor]:
        """Return what Adam keeps for the compact weights, whole."""
        found = {}
        for name, each in self.stepper.topology.weights.items():

            def keep(tensor: Tensor, name: str = name) -> Tensor:
                found[f"{name} {len(found)}"] = tensor.clone()
                return tensor

            self.stepper.kept.change(each.parameter, keep)
        return found


def main(out: Path, names: list[str], ways: list[str]) -> None:
    ranks, _ = deepspeed.start()
    source = sets.load(SMALL_DIGITS)
    losses: dict[str, list[float]] = {}
    for name in names:
        for way in ways:
            config = settings(name, **WAYS[way])
            stage = replace(config.deepspeed, zero_stage=int(way[0]))
            config = replace(config, deepspeed=stage)
            run = Run(name, config, ranks, source)
            assert isinstance(run.stepper.kept, KeptSharded) is (way[0] == "3")
            losses[f"{name} {way}"] = []
            for update in range(UPDATES):
                losses[f"{name} {way}"] += run.steps(update * EVERY, (update + 1) * EVERY)
                if ranks.rank == 0:
                    write_tensors(out / f"{name} {way} {update}.safetensors", run.masks(), {})
            losses[f"{name} {way}"] += run.steps(UPDATES * EVERY, STEPS)
            moments, state = run.moments(), run.stepper.state_dict()
            if ranks.rank == 0:
                write_tensors(out / f"{name} {way} moments.safetensors", moments, {})
                values = {n: t for n, t in state.items() if t.is_floating_point()}
                write_tensors(out / f"{name} {way} values.safetensors", values, {})
            run.stepper.close()
    for stage in range(4):
        if str(stage) in ways:
            losses[f"resumed {stage}"] = resumed(stage, ranks, source, out / f"stage{stage}")
    (out / f"rank{ranks.rank}.json").write_text(json.dumps(losses))


def resumed(stage: int, ranks: Any, source: Any, folder: Path) -> list[float]:
    """Save after step 4, go on with a new engine from there, and return the losses after it."""
    config = settings("test_vit")
    config = replace(config, deepspeed=replace(config.deepspeed, zero_stage=stage))
    first = Run("test_vit", config, ranks, source, folder)
    first.steps(0, 4)
    first.stepper.save(folder, History())
    first.stepper.close()
    again = Run("test_vit", config, ranks, source, folder)
    assert again.stepper.load(folder) is not None
    found = again.steps(4, STEPS)
    again.stepper.close()
    return found


if __name__ == "__main__":
    main(Path(sys.argv[-3]), sys.argv[-2].split(","), sys.argv[-1].split(","))
