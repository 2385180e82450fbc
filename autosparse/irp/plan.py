"""The plan of a corpus: its runs, which of them are finished, and what the others will cost."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autosparse.core.errors import UserError
from autosparse.core.files import place, read_card
from autosparse.corpus import store
from autosparse.data import sets
from autosparse.data.sets import DataSource, Shape
from autosparse.irp import run as irp
from autosparse.irp.config import CorpusConfig, IRPConfig
from autosparse.models import zoo
from autosparse.models.config import ModelConfig
from autosparse.training.config import TrainingConfig
from autosparse.training.loop import steps_per_epoch
from autosparse.training.steppers import PlainStepper

PROBED_STEPS = 3
"""Training steps that are timed, for an estimate; set by hand."""
USUAL_IMAGES, USUAL_CLASSES = 10_000, 1000
"""Images per epoch, and classes, where the settings do not say; only the order of runs depends on
them."""
BYTES_STORED, BYTES_REMADE = 5, 1
"""Per prunable weight: fp32 initial value and uint8 survival, or survival alone."""
Known = tuple[float, str]
"""Seconds per image of a level, and where that is known from: corpus or probe."""


def runs(config: CorpusConfig, folder: str | Path) -> dict[str, IRPConfig]:
    """Return the plan's runs by run_id, in order, checked; `folder` is where they go."""
    plan = {irp.run_folder(run).name: run for run in replace(config, out=str(folder)).runs()}
    for run in plan.values():
        irp.check(run)
    return plan


def levels_done(folder: Path, run: IRPConfig) -> int:
    """Return how many of a run's levels are finished."""
    if store.is_finished(folder):
        return run.levels + 1
    return len(list(folder.glob("levels/*/level.safetensors")))


def largest_first(todo: dict[str, IRPConfig]) -> list[str]:
    """Order runs by how much they compute, largest first, so that no long run starts last."""
    return sorted(todo, key=lambda name: -_arithmetic(todo[name]))


def _arithmetic(run: IRPConfig) -> float:
    """Estimate the operations of a run; only the order of runs depends on it."""
    images = run.data.train_limit or USUAL_IMAGES
    per_level = images * run.training.epochs
    if run.steps_per_level is not None:
        per_level = run.steps_per_level * run.training.batch_size
    try:
        per_image = operations(run.model.name, _frozen(run.model.options), sets.shape(run.data))
    except (UserError, ValueError, TypeError, AssertionError, RuntimeError):
        return 0.0  # The run itself will report a wrong option or an image that is too small.
    return per_image * per_level * (run.levels + 1)


@cache
def operations(name: str, options: str, shape: Shape) -> int:
    """Return the floating-point operations of a forward pass of one image; options are JSON."""
    config = ModelConfig(name, json.loads(options))
    classes, channels = shape.num_classes or USUAL_CLASSES, shape.in_chans
    model = zoo.create(
        config, num_classes=classes, in_chans=channels, image_size=shape.image_size, seed=0
    )
    model = model.to("meta").eval()
    image = torch.zeros(1, shape.in_chans, shape.image_size, shape.image_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops()


def _frozen(options: dict[str, Any]) -> str:
    return json.dumps(options, sort_keys=True)


def table(config: CorpusConfig, folder: str | Path) -> list[dict[str, Any]]:
    """Return a row per run: what is done, its size, and what the rest costs.

    `seconds` is what is left to do, on `cpus_per_run` CPUs (or the GPU): from levels of the same
    model, data and batch size that the corpus holds (`measured`: corpus), or else from a few
    training steps made now (`measured`: probe). `bytes` is what the run will take on disk.
    """
    plan = runs(config, folder)
    known = _seconds_per_image(folder, plan)
    with sets.remembered():
        return [_row(config, place(folder) / name, run, known) for name, run in plan.items()]


def _row(
    config: CorpusConfig, folder: Path, run: IRPConfig, known: dict[tuple[Any, ...], Known]
) -> dict[str, Any]:
    source = sets.load(run.data)
    model = zoo.create_for(source, run.model, run.seed)
    weights = sum(each.numel() for each in zoo.prunable(model, run.model.exclude).values())
    rest = sum(each.numel() * each.element_size() for each in model.state_dict().values())
    done = levels_done(folder, run)
    key = _kind(run)
    per_image = known.get(key)
    if per_image is None:
        taken = probed(model, source, run.training, run.device, config.cpus_per_run, run.seed)
        per_image = known[key] = (taken, "probe")
    epochs = steps_per_epoch(source.train, run.training) * run.training.epochs
    images = (run.steps_per_level or epochs) * run.training.batch_size
    bytes_ = weights * BYTES_REMADE
    if config.store_initial:
        bytes_ = weights * (BYTES_STORED - 4) + rest
    if run.rewind_steps:
        bytes_ += rest  # The whole state after step k.
    return {
        "run_id": folder.name, "model": run.model.name, "data": source.name, "seed": run.seed,
        "label": run.label, "levels": f"{done}/{run.levels + 1}", "weights": weights,
        "seconds": per_image[0] * images * (run.levels + 1 - done),
        "bytes": bytes_, "measured": per_image[1],
    }  # fmt: skip


def _kind(run: IRPConfig) -> tuple[Any, ...]:
    return (run.model.name, _frozen(run.model.options), run.data.name, run.data.image_size,
            run.training.batch_size, run.device)  # fmt: skip


def _seconds_per_image(
    folder: str | Path, plan: dict[str, IRPConfig]
) -> dict[tuple[Any, ...], Known]:
    """Return seconds per image of a level, by kind, from the levels that the corpus holds."""
    seconds: dict[tuple[Any, ...], list[float]] = {}
    for name, run in plan.items():
        for level in _entries(place(folder) / name):
            sums = seconds.setdefault(_kind(run), [0.0, 0.0])
            sums[0] += level["seconds"]
            sums[1] += level["image_passes"]
    return {kind: (taken / images, "corpus") for kind, (taken, images) in seconds.items() if images}


def _entries(folder: Path) -> Iterable[dict[str, Any]]:
    if store.is_finished(folder):
        return read_card(folder / store.RUN)["levels"]
    try:
        return [read_card(path) for path in sorted(folder.glob("levels/*/level.safetensors"))]
    except UserError:
        return []  # A damaged level is reported when the run goes on.


def probed(
    model: nn.Module,
    source: DataSource,
    training: TrainingConfig,
    device: str,
    cpus: float,
    seed: int = 0,
) -> float:
    """Time a few training steps of a copy of `model`; return seconds per image."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(cpus)))
    where = zoo.choose_device(device)
    stepper = PlainStepper(copy.deepcopy(model).to(where), training, 1)
    size = min(training.batch_size, len(source.train))
    try:
        batches = iter(source.to(where).training_batches(size, seed))
        for number in range(PROBED_STEPS + 1):
            if number == 1:  # The first is warm-up.
                started = time.perf_counter()
            loss = stepper.step(*next(batches))
        float(loss)
        return (time.perf_counter() - started) / PROBED_STEPS / size
    finally:
        torch.set_num_threads(threads)


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of `table` in the units that a terminal shows."""
    left = {"minutes left": f"{row['seconds'] / 60:.1f}", "MB": f"{row['bytes'] / 1e6:.2f}"}
    return {k: v for k, v in row.items() if k not in ("seconds", "bytes")} | left


def summary(rows: list[dict[str, Any]], config: CorpusConfig) -> str:
    """Return one line: how many runs are left, and about what they cost."""
    finished = sum(row["seconds"] == 0 for row in rows)
    hours = sum(row["seconds"] for row in rows) / 3600
    unit = "GPU" if config.gpus_per_run else "CPU"
    per_run = config.gpus_per_run or config.cpus_per_run
    slots = max(1, int((os.cpu_count() or 1) / max(config.cpus_per_run, 1e-9)))
    here = f", about {60 * hours / slots:.0f} min on this machine" if unit == "CPU" else ""
    size = sum(row["bytes"] for row in rows)
    return (
        f"{len(rows)} runs, {finished} finished, {len(rows) - finished} to do: about "
        f"{hours * per_run:.2f} {unit} hours{here}; {size / 1e6:,.1f} MB on disk in all"
    )
