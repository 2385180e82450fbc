"""How fast iterative rewind pruning trains: resnet18 at 32 px on all of CIFAR-10, on one GPU.

A run of one level after the dense one, 16 epochs each, by `run_irp`; after five epochs, in turn, an
epoch of a bare loop: the same model dense, compiled, bf16, channels last, the same optimizer, on
normalised batches of random images that lie on the device. `level_seconds` is the level's own time
(what the bare loop took is not in it): training, evaluation, and the choice of the next mask.
"""

from __future__ import annotations

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
from torch._dynamo.utils import counters

from autosparse.data.config import DataConfig
from autosparse.irp.config import IRPConfig
from autosparse.irp.run import run_irp
from autosparse.models import zoo
from autosparse.models.config import ModelConfig
from autosparse.training.config import TrainingConfig
from autosparse.training.optimizers import optimizer_and_schedule
from autosparse.training.steppers import Epoch, autocast
from benchmarks.gpu.measure import CLASSES, SEED, Recorder, Setting, random_source

IMAGES, TINY_IMAGES, SIDE = 60_000, 200, 32
LEVELS, DENSITY, PAIRS = 1, 0.5, 5
TRAINING = TrainingConfig(
    epochs=16,
    batch_size=512,
    optimizer="nesterov",
    optimizer_options={"momentum": 0.9},
    learning_rate=0.2,
    weight_decay=5e-4,
    warmup_epochs=2.0,
    label_smoothing=0.2,
    precision="bf16",
    channels_last=True,
    compile=True,
    checkpoint_epochs=0,
)
TINY_TRAINING = replace(TRAINING, epochs=2, batch_size=32, warmup_epochs=0.0, compile=False)


def run(setting: Setting, recorder: Recorder) -> None:
    with tempfile.TemporaryDirectory() as folder:
        given = None if setting.tiny else setting.data
        root = given or Path(folder, "images")
        if given is None:
            write_images(root, TINY_IMAGES if setting.tiny else IMAGES)
        config = IRPConfig(
            model=ModelConfig("test_resnet") if setting.tiny else
            ModelConfig("resnet18", small_stem=True),
            data=DataConfig(
                "folder", str(root), image_size=SIDE, augment="shift+altflip",
                validation_fraction=0.05,
            ),
            training=TINY_TRAINING if setting.tiny else TRAINING,
            levels=LEVELS,
            final_density=DENSITY,
            device=str(setting.device),
            out=str(Path(folder, "corpus")),
        )  # fmt: skip
        measure(config, setting, recorder)


def measure(config: IRPConfig, setting: Setting, recorder: Recorder) -> None:
    """Do the run; after some epochs of the second level, an epoch of the bare loop."""
    started = time.perf_counter()
    bare = bare_epoch(config, setting)
    bare()
    recorder.note("bare_compile_seconds", round(time.perf_counter() - started, 2))
    pairs: list[tuple[float, float]] = []
    levels: list[float] = []
    graphs: list[int] = []
    aside = [0.0]

    def on_epoch(level: int, epoch: Epoch) -> None:
        begun = time.perf_counter()
        if level and epoch.epoch > 1 and len(pairs) < PAIRS:
            pairs.append((epoch.images_per_second, bare()))
            record_rates(pairs, recorder)
        aside[0] += time.perf_counter() - begun

    def on_level(entry: dict[str, Any]) -> None:
        levels.append(entry["seconds"] - aside[0])
        graphs.append(counters["stats"]["unique_graphs"])
        recorder.note(f"level_{entry['level']}", {**entry, "aside": aside[0]})
        aside[0] = 0.0

    started = time.perf_counter()
    run_irp(config, on_epoch, on_level)
    recorder.note("run_seconds", round(time.perf_counter() - started, 2))
    recorder.add("level_seconds", levels[1:])
    recorder.add("first_level_seconds", levels[:1])
    recorder.add("graphs_after_first_level", [float(graphs[1] - graphs[0])])


def record_rates(pairs: list[tuple[float, float]], recorder: Recorder) -> None:
    """Record images per second, ours and the bare loop's, as far as they are known."""
    recorder.add("level_images_per_s", [ours for ours, _ in pairs])
    recorder.add("bare_images_per_s", [bare for _, bare in pairs])
    recorder.add("level_vs_bare", [ours / bare for ours, bare in pairs])


def bare_epoch(config: IRPConfig, setting: Setting) -> Callable[[], float]:
    """Return a job: an epoch of a plain loop over random images; it returns images per second."""
    training = replace(config.training, schedule="none")
    count = TINY_IMAGES if setting.tiny else IMAGES * 5 // 6
    there = random_source(count, SIDE, setting.device)
    model = zoo.create_for(there, config.model, SEED)
    model = model.to(setting.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    network = torch.compile(model) if training.compile else model
    optimizer, _ = optimizer_and_schedule(model, training, 1)
    loss_of = nn.CrossEntropyLoss(label_smoothing=training.label_smoothing)
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
            loss_of(outputs.float(), labels).backward()
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
