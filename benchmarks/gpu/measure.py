"""What the stages share: time on the device, figures that are written as they come, tickets."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.core.files import write_json
from autosparse.data.memory import MemorySplit
from autosparse.data.sets import DataSource
from autosparse.models.config import ModelConfig
from autosparse.models.zoo import create, prunable
from autosparse.sparsity.ticket import Ticket, compact
from benchmarks.gpu.goals import STAGES
from benchmarks.report import figure, machine

RUNS, WARM_UP = 5, 2
CLASSES, SEED = 10, 0
ASLEEP = 100_000_000
"""Clock cycles, about 50 ms, in which the host gets ahead of the device."""


@dataclass(frozen=True)
class Setting:
    """Where a stage runs, and how big."""

    device: torch.device
    tiny: bool
    """Sizes of a moment on a CPU: to see that a stage runs, not to measure."""
    data: Path | None = None
    """A folder with CIFAR-10 as train/CLASS and test/CLASS; by default random images."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


@dataclass
class Recorder:
    """The figures of a stage; the file is written anew after each, so that a kill loses none."""

    stage: str
    path: Path | None
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def add(self, name: str, runs: list[float]) -> None:
        """Take a figure of goals.py: the median of its runs."""
        unit, goal, peer = STAGES[self.stage][name]
        self.figures[name] = figure(runs, unit, goal, peer)
        value, low, high = statistics.median(runs), min(runs), max(runs)
        print(f"{name}: {value:.4g} {unit} ({low:.4g} to {high:.4g})", flush=True)
        self.write()

    def note(self, name: str, value: Any) -> None:
        """Keep something that is no figure."""
        self.notes[name] = value
        print(f"{name}: {value}", flush=True)
        self.write()

    def write(self) -> None:
        """Write all that is known by now."""
        if self.path:
            whole = {
                "stage": self.stage,
                "machine": machine(),
                "seconds": round(time.perf_counter() - self.started, 1),
                "figures": self.figures,
                "notes": self.notes,
            }
            write_json(self.path, whole)


def milliseconds(job: Callable[[], Any], setting: Setting, steps: int = 1) -> float:
    """Return how long a job takes, the mean of `steps` in a row, by events on a GPU."""
    if not setting.on_gpu:
        started = time.perf_counter()
        for _ in range(steps):
            job()
        return (time.perf_counter() - started) * 1e3 / steps
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    setting.wait()
    begin.record()
    for _ in range(steps):
        job()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / steps


def device_milliseconds(job: Callable[[], Any], setting: Setting) -> list[float]:
    """Return how long the device is at a job that has been handed over to it before it begins.

    It sleeps first, so that it never waits for the host; the job must be fewer launches than its
    queue holds (about a thousand).
    """
    taken = []
    for _ in range(RUNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        setting.wait()
        torch.cuda._sleep(ASLEEP)
        begin.record()
        job()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return taken


def in_turn(
    jobs: dict[str, Callable[[], Any]],
    setting: Setting,
    *,
    runs: int = RUNS,
    steps: int = 1,
    warm_up: int = WARM_UP,
) -> dict[str, list[float]]:
    """Time the jobs A B A B … after warming up; return the milliseconds of every run.

    In the tiny form everything is done once.
    """
    if setting.tiny:
        runs, steps, warm_up = 1, 1, 0
    for job in jobs.values():
        for _ in range(warm_up):
            job()
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(runs):
        for name, job in jobs.items():
            taken[name].append(milliseconds(job, setting, steps))
    return taken


def ratios(taken: dict[str, list[float]], one: str, other: str) -> list[float]:
    """Return how many times as long one took as the other, run by run."""
    return [a / b for a, b in zip(taken[one], taken[other], strict=True)]


def peak_of(build: Callable[[], Callable[[], Any]], setting: Setting) -> tuple[Any, int]:
    """Return what `build` made, a job, and the bytes by which it and three calls raise memory."""
    if not setting.on_gpu:
        return build(), 0
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(setting.device)
    torch.cuda.reset_peak_memory_stats(setting.device)
    job = build()
    for _ in range(3):
        job()
    setting.wait()
    return job, torch.cuda.max_memory_allocated(setting.device) - before


def waits(steps: Iterable[Any], setting: Setting) -> list[str]:
    """Return the lines of Python in which the steps, but for the first, wait for the device."""
    walk = iter(steps)
    next(walk)
    if not setting.on_gpu:
        list(walk)
        return []
    setting.wait()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            list(walk)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    told = [each for each in caught if "synchronizing CUDA" in str(each.message)]
    return sorted({f"{'/'.join(Path(e.filename).parts[-2:])}:{e.lineno}" for e in told})


def dense_model(config: ModelConfig, side: int) -> nn.Module:
    """Return a timm model for ten classes, on the CPU."""
    return create(config, num_classes=CLASSES, in_chans=3, image_size=side, seed=SEED)


def random_masks(model: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Return masks of random weights, about the same density in every layer, none empty."""
    generator = torch.Generator().manual_seed(SEED)
    found = {}
    for name, weight in prunable(model).items():
        found[name] = torch.rand(weight.shape, generator=generator) >= sparsity
        found[name].view(-1)[0] = True
    return found


def compacted(model: nn.Module, sparsity: float) -> nn.Module:
    """Return a copy of a model, compact under random masks; at 0 it is the dense copy."""
    twin = copy.deepcopy(model)
    if not sparsity:
        return twin
    return compact(twin, Ticket.from_model(twin, random_masks(twin, sparsity), {}))


def random_batch(count: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return normalised images and labels, on the device."""
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(count, 3, side, side, generator=generator)
    return images.to(device), (torch.arange(count) % CLASSES).to(device)


def random_source(count: int, side: int, device: torch.device) -> DataSource:
    """Return a source of random pixels that lies on the device."""
    generator = torch.Generator().manual_seed(SEED)
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    whole = MemorySplit(pixels, torch.arange(count) % CLASSES)
    few = MemorySplit(pixels[:CLASSES], whole.labels[:CLASSES])
    source = DataSource(
        name="random",
        train=whole,
        validation=few,
        test=few,
        num_classes=CLASSES,
        in_chans=3,
        image_size=side,
        mean=(0.5,) * 3,
        std=(0.29,) * 3,
        augment="shift+flip",
        fingerprint="random",
    )
    return source.to(device)
