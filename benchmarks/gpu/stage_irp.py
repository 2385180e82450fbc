"""How fast iterative rewind pruning trains: resnet18 at 32 px on all of CIFAR-10, on one GPU.

A run of one level after the dense one, 16 epochs each, by `run_irp`; after every epoch, in turn, an
epoch of a bare loop: the same model dense, compiled, bf16, channels last, the same optimizer, on
normalised batches that lie on the device. `level_seconds` is the level's own time (what the bare
loop took is not in it): training, evaluation, and the choice of the next mask.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from autosparse import data, models
from autosparse.config import DataConfig, IRPConfig, ModelConfig, TrainingConfig
from autosparse.data import DataSource
from autosparse.irp import run_irp
from autosparse.optimizers import optimizer_and_schedule
from autosparse.steppers import Epoch, autocast
from benchmarks.gpu.measure import CLASSES, SEED, Recorder, Setting

IMAGES, TINY_IMAGES, SIDE = 60_000, 200, 32
LEVELS, DENSITY = 1, 0.5
TRAINING = TrainingConfig(
    epochs=16,
    batch_size=512,
    optimizer="sgd",
    learning_rate=0.2,
    weight_decay=5e-4,
    warmup_epochs=2.0,
    precision="bf16",
    channels_last=True,
    compile=True,
    checkpoint_epochs=0,
)
TINY_TRAINING = replace(TRAINING, epochs=2, batch_size=32, warmup_epochs=0.0, compile=False)


def run(setting: Setting, recorder: Recorder) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = setting.data or Path(folder, "images")
        if setting.data is None:
            write_images(root, TINY_IMAGES if setting.tiny else IMAGES)
        config = IRPConfig(
            model=ModelConfig("test_resnet") if setting.tiny else
            ModelConfig("resnet18", small_stem=True),
            data=DataConfig("folder", str(root), image_size=SIDE),
            training=TINY_TRAINING if setting.tiny else TRAINING,
            levels=LEVELS,
            final_density=DENSITY,
            device=str(setting.device),
            out=str(Path(folder, "corpus")),
        )  # fmt: skip
        measure(config, setting, recorder)


def measure(config: IRPConfig, setting: Setting, recorder: Recorder) -> None:
    """Do the run, a bare epoch after each of its own."""
    started = time.perf_counter()
    source = data.load(config.data)
    recorder.note("data_seconds", round(time.perf_counter() - started, 2))
    started = time.perf_counter()
    bare = bare_epoch(source, config, setting)
    bare()
    recorder.note("bare_compile_seconds", round(time.perf_counter() - started, 2))
    ours: list[float] = []
    theirs: list[float] = []
    aside = [0.0]
    levels: list[float] = []

    def on_epoch(level: int, epoch: Epoch) -> None:
        begun = time.perf_counter()
        if level and epoch.epoch > 1:
            ours.append(epoch.images_per_second)
            theirs.append(bare())
        aside[0] += time.perf_counter() - begun

    def on_level(entry: dict[str, Any]) -> None:
        levels.append(entry["seconds"] - aside[0])
        recorder.note(f"level_{entry['level']}", {**entry, "aside": aside[0]})
        aside[0] = 0.0

    run_irp(config, on_epoch, on_level)
    recorder.add("level_images_per_s", ours)
    recorder.add("bare_images_per_s", theirs)
    recorder.add("level_vs_bare", [a / b for a, b in zip(ours, theirs, strict=True)])
    recorder.add("level_seconds", levels[1:])
    recorder.add("first_level_seconds", levels[:1])


def bare_epoch(source: DataSource, config: IRPConfig, setting: Setting) -> Callable[[], float]:
    """Return a job: an epoch of a plain loop; it returns the images per second."""
    training = replace(config.training, schedule="none")
    model = copy.deepcopy(models.create_for(source, config.model, SEED))
    model = model.to(setting.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    network = torch.compile(model) if training.compile else model
    optimizer, _ = optimizer_and_schedule(model, training, 1)
    there = source.to(setting.device)
    batches = [
        (there.prepare(images).contiguous(memory_format=torch.channels_last), labels)
        for images, labels in there.train.shuffled(training.batch_size, seed=SEED, epoch=0)
    ]

    def epoch() -> float:
        setting.wait()
        started = time.perf_counter()
        for images, labels in batches:
            with autocast(training, setting.device):
                outputs = network(images)
            nn.functional.cross_entropy(outputs.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        setting.wait()
        return len(batches) * training.batch_size / (time.perf_counter() - started)

    return epoch


def write_images(root: Path, count: int) -> None:
    """Write random images as CIFAR-10's folder has them, a sixth of them the test split."""
    rng = np.random.default_rng(SEED)
    for number in range(count):
        split = "test" if number % 6 == 0 else "train"
        folder = root / split / f"class{number // 6 % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.jpg", quality=90)
