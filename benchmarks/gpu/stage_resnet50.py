"""A training step dense and compact: resnet50 and ViT-B at 224 px, resnet18 at 32 px, in bf16.

Steps are `PlainStepper.step` on a batch that lies on the device, timed in turn by events; the bare
loop is plain PyTorch with the same optimizer. `fit_vs_step` is the whole loop over images that lie
on the device as bytes, augmentation included. Memory is the peak of model, optimizer and steps.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.models.config import ModelConfig
from autosparse.training.config import TrainingConfig
from autosparse.training.loop import fit
from autosparse.training.optimizers import optimizer_and_schedule
from autosparse.training.steppers import History, PlainStepper, autocast
from benchmarks.gpu.goals import MODELS, SPARSITIES
from benchmarks.gpu.measure import (
    SEED,
    Recorder,
    Setting,
    compacted,
    dense_model,
    in_turn,
    peak_of,
    random_batch,
    random_source,
    ratios,
    waits,
)

EPOCHS = 4
"""Of the loop that is timed whole; the first is not counted."""
STEPS = 6
"""In which it is told what waits for the device; the first is not counted."""
DENSE, BARE, EACH = "dense", "bare", "each"


@dataclass(frozen=True)
class Network:
    """A model, and what it is trained on."""

    config: ModelConfig
    side: int
    batch: int
    steps: int
    """In a row, of one time."""
    batches: int = 6
    """Of an epoch of the loop that is timed whole."""

    def training(self) -> TrainingConfig:
        return TrainingConfig(
            epochs=EPOCHS, batch_size=self.batch, precision="bf16", channels_last=True,
            schedule="none", checkpoint_epochs=0,
        )  # fmt: skip


NETWORKS = {
    "resnet50": Network(ModelConfig("resnet50"), 224, 256, 4),
    "vit_base": Network(ModelConfig("vit_base_patch16_224"), 224, 256, 2),
    "resnet18_32px": Network(ModelConfig("resnet18", small_stem=True), 32, 512, 20, 92),
}
TINY = {
    "resnet50": Network(ModelConfig("test_resnet"), 32, 4, 1),
    "vit_base": Network(ModelConfig("test_vit", {"patch_size": 8}), 32, 4, 1),
    "resnet18_32px": Network(ModelConfig("test_byobnet"), 32, 4, 1),
}


def run(setting: Setting, recorder: Recorder) -> None:
    for name in MODELS:
        measure(name, (TINY if setting.tiny else NETWORKS)[name], setting, recorder)


def measure(name: str, network: Network, setting: Setting, recorder: Recorder) -> None:
    """Measure one model dense and at all sparsities."""
    model = dense_model(network.config, network.side)
    batch = random_batch(network.batch, network.side, setting.device)
    steppers, peaks = {}, {}
    for sparsity in (0, *SPARSITIES):
        key = f"{sparsity}" if sparsity else DENSE
        made: list[PlainStepper] = []

        def build(sparsity: int = sparsity, made: list[PlainStepper] = made) -> Callable[[], Any]:
            made.append(stepper_of(compacted(model, sparsity / 100), network, setting))
            return lambda: made[0].step(*batch)

        _, peaks[key] = peak_of(build, setting)
        steppers[key] = made[0]
    jobs: dict[str, Callable[[], Any]] = {
        key: lambda each=each: each.step(*batch) for key, each in steppers.items()
    }
    jobs[BARE] = bare_step(model, network, setting, batch)
    jobs[EACH] = one_by_one(model, network, setting, batch)
    taken = in_turn(jobs, setting, steps=network.steps)
    recorder.add(f"step_ms_{name}_dense", taken[DENSE])
    recorder.add(f"dense_vs_bare_{name}", ratios(taken, DENSE, BARE))
    for sparsity in SPARSITIES:
        recorder.add(f"step_vs_dense_{sparsity}_{name}", ratios(taken, f"{sparsity}", DENSE))
    recorder.add(f"each_vs_ours_95_{name}", ratios(taken, EACH, "95"))
    if setting.on_gpu:
        recorder.note(f"peak_bytes_{name}", peaks)
        for sparsity in SPARSITIES:
            share = peaks[f"{sparsity}"] / peaks[DENSE]
            recorder.add(f"peak_vs_dense_{sparsity}_{name}", [share])
    del jobs
    whole_loop(name, network, steppers["95"], taken["95"], setting, recorder)
    checkpoints(name, steppers, recorder)
    if setting.on_gpu:
        torch.cuda.empty_cache()


def stepper_of(
    model: nn.Module, network: Network, setting: Setting, **changes: Any
) -> PlainStepper:
    """Return what trains a model on the device."""
    model = model.to(setting.device).train()
    return PlainStepper(model, replace(network.training(), **changes), network.batches)


def one_by_one(
    model: nn.Module, network: Network, setting: Setting, batch: tuple[Tensor, Tensor]
) -> Callable[[], Any]:
    """Return the step at 95 % that scatters every weight by itself."""
    stepper = stepper_of(compacted(model, 0.95), network, setting, scatter="each")
    return lambda: stepper.step(*batch)


def bare_step(
    model: nn.Module, network: Network, setting: Setting, batch: tuple[Tensor, Tensor]
) -> Callable[[], Any]:
    """Return the step of a plain PyTorch loop with the dense model."""
    model = copy.deepcopy(model).to(setting.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    config = network.training()
    optimizer, _ = optimizer_and_schedule(model, config, network.batches)
    images = batch[0].contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with autocast(config, setting.device):
            outputs = model(images)
        nn.functional.cross_entropy(outputs.float(), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def whole_loop(
    name: str,
    network: Network,
    stepper: PlainStepper,
    step_ms: list[float],
    setting: Setting,
    recorder: Recorder,
) -> None:
    """Time `fit` over images on the device, and find where its steps wait for it."""
    source = random_source(network.batches * network.batch, network.side, setting.device)
    history = fit(stepper, source, network.training(), seed=SEED)
    alone = network.batch * 1e3 / sorted(step_ms)[len(step_ms) // 2]
    rates = [epoch.images_per_second for epoch in history.epochs[1:]]
    recorder.add(f"fit_vs_step_{name}", [alone / rate for rate in rates])
    recorder.note(f"data_wait_share_{name}", history.epochs[-1].data_wait_share)
    stepper.model.train()
    batches = source.training_batches(network.batch, SEED)
    found = waits(
        (stepper.step(*each) for each, _ in zip(batches, range(STEPS), strict=False)), setting
    )
    recorder.note(f"sync_places_{name}", found)
    recorder.add(f"syncs_{name}", [float(len(found))])


def checkpoints(name: str, steppers: dict[str, PlainStepper], recorder: Recorder) -> None:
    """Write a checkpoint of each and compare the bytes."""
    sizes = {}
    for key, stepper in steppers.items():
        with tempfile.TemporaryDirectory() as folder:
            stepper.save(Path(folder), History())
            sizes[key] = sum(each.stat().st_size for each in Path(folder).rglob("*"))
    recorder.note(f"checkpoint_bytes_{name}", sizes)
    for sparsity in SPARSITIES:
        share = sizes[f"{sparsity}"] / sizes[DENSE]
        recorder.add(f"checkpoint_vs_dense_{sparsity}_{name}", [share])
