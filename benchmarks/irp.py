"""How fast IRP trains and grows, on two cores: against a bare loop, the usual way, one worker.

    python -m benchmarks.irp --json irp.json

- `vs_bare_loop_conv`, `vs_bare_loop_vit`: images per second of an IRP level at 10 % density, as
  `irp.levels` trains it (compact weights, `PlainStepper`, `fit`, augmentation), relative to a
  loop over normalised float batches in memory that trains the same model dense with the same
  optimizer and batch size.
- `vs_usual_way`: the same level relative to PIL images in a torchvision dataset with its
  transforms, a DataLoader with two workers (started before the clock), and weights multiplied by
  their masks after every step.
- `two_workers_speedup`: seconds that `grow` takes for eight small runs on one Ray CPU, divided by
  those on two. Ray's start and stop and its workers' imports count, the driver's imports do not.
- `driver_seconds_per_level`: what two workers do besides levels, in seconds of a worker per level:
  (2 x seconds of the whole, as above, - the sum of `seconds` in the cards) / number of levels.

`fit` evaluates once, on ten images here, which the other loops do not.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from autosparse.corpus import store
from autosparse.data.config import DataConfig
from autosparse.data.memory import MemorySplit, in_memory
from autosparse.data.sets import DataSource
from autosparse.irp.config import CorpusConfig
from autosparse.models import zoo
from autosparse.models.config import ModelConfig
from autosparse.sparsity import masks
from autosparse.sparsity.ticket import Ticket, compact
from autosparse.training import loop, optimizers, steppers
from autosparse.training.config import TrainingConfig
from benchmarks.report import figure, publish, seconds_in_turn

THREADS, WORKERS, SEED = 2, 2, 0
IMAGES, SIDE, CLASSES, DENSITY = 3000, 32, 10, 0.1
TRAINING = TrainingConfig(epochs=1, warmup_epochs=0.0, checkpoint_epochs=0)
CONV, VIT = ModelConfig("test_resnet"), ModelConfig("test_vit", {"patch_size": 8})
RUNS_GROWN, PAIRS, RUNS = 8, 3, 9
EIGHT_RUNS = CorpusConfig(
    models=[ModelConfig("test_byobnet")],
    seeds=list(range(RUNS_GROWN)),
    training=TrainingConfig(epochs=6, checkpoint_epochs=0),
    levels=4,
    final_density=DENSITY,
)

Figures = dict[str, dict[str, Any]]


def random_images(count: int = IMAGES) -> DataSource:
    """Return a source of random pixels, held in memory as every small set is."""
    generator = torch.Generator().manual_seed(SEED)
    pixels = torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    whole = MemorySplit(pixels, torch.arange(count) % CLASSES)
    few = MemorySplit(whole.images[:CLASSES], whole.labels[:CLASSES])
    return in_memory(
        "random",
        whole,
        few,
        DataConfig(),
        validation=few,
        num_classes=CLASSES,
        augment="shift+flip",
    )


def random_masks(model: nn.Module) -> masks.Masks:
    """Return masks of random weights at `DENSITY`."""
    generator = torch.Generator().manual_seed(SEED)
    weights = zoo.prunable(model).items()
    scores = {name: torch.rand(weight.shape, generator=generator) for name, weight in weights}
    return masks.from_scores(scores, 1 - DENSITY)


def level(source: DataSource, dense: nn.Module) -> Callable[[], Any]:
    """Return a job: an epoch of an IRP level."""
    model = copy.deepcopy(dense)
    model = compact(model, Ticket.from_model(model, random_masks(model), {}))
    steps = loop.steps_per_epoch(source.train, TRAINING)
    stepper = steppers.PlainStepper(model, TRAINING, steps)

    def job() -> None:
        with loop.seeded(SEED):
            loop.fit(stepper, source, TRAINING, seed=SEED, on_step=lambda number: None)

    return job


def train(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], after_step: Callable[[], None]
) -> Callable[[], Any]:
    """Return a job: an epoch of a plain PyTorch loop at the peak learning rate."""
    optimizer, _ = optimizers.optimizer_and_schedule(model, replace(TRAINING, schedule="none"), 1)

    def job() -> None:
        model.train()
        for images, labels in batches:
            loss = cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            after_step()

    return job


def bare_loop(source: DataSource, dense: nn.Module) -> Callable[[], Any]:
    """Return a job: an epoch of dense training on float batches that are there already."""
    shuffled = source.train.shuffled(TRAINING.batch_size, seed=SEED, epoch=0)
    batches = [(source.prepare(images), labels) for images, labels in shuffled]
    return train(copy.deepcopy(dense), batches, lambda: None)


class PILImages(Dataset):
    """Images held as torchvision's CIFAR10 holds them, made PIL images one by one."""

    def __init__(self, split: MemorySplit, transform: Callable[[Image.Image], Tensor]) -> None:
        self.data = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets, self.transform = split.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def usual_way(source: DataSource, dense: nn.Module) -> Callable[[], Any]:
    """Return a job: an epoch with torchvision's transforms, a DataLoader, and masks multiplied."""
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.RandomCrop(SIDE, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(source.mean, source.std),
        ]
    )
    assert isinstance(source.train, MemorySplit)
    batches = DataLoader(
        PILImages(source.train, transform),
        TRAINING.batch_size,
        shuffle=True,
        num_workers=WORKERS,
        drop_last=True,
        persistent_workers=True,
    )
    model = copy.deepcopy(dense)
    kept = {name: mask.float() for name, mask in random_masks(model).items()}

    @torch.no_grad()
    def multiply() -> None:
        for name, mask in kept.items():
            model.get_parameter(name).mul_(mask)

    multiply()
    return train(model, batches, multiply)


def times_as_fast(ours: Callable[[], Any], theirs: Callable[[], Any]) -> list[float]:
    """Return how many times as fast ours is, run by run."""
    taken = seconds_in_turn({"ours": ours, "theirs": theirs}, RUNS)
    return [b / a for a, b in zip(taken["ours"], taken["theirs"], strict=True)]


def training_figures(images: int = IMAGES) -> Figures:
    """Measure levels against a bare loop and against the usual way."""
    torch.set_num_threads(THREADS)
    source, found, peer = random_images(images), {}, "same model dense, bare loop"
    for kind, config in (("conv", CONV), ("vit", VIT)):
        dense = zoo.create_for(source, config, SEED)
        ratios = times_as_fast(level(source, dense), bare_loop(source, dense))
        found[f"vs_bare_loop_{kind}"] = figure(ratios, "times as fast", ">= 0.9", peer)
    dense = zoo.create_for(source, CONV, SEED)
    ratios = times_as_fast(level(source, dense), usual_way(source, dense))
    peer = "torchvision, DataLoader, masks multiplied"
    found["vs_usual_way"] = figure(ratios, "times as fast", ">= 1.5", peer)
    return found


def seconds_to_grow(config: CorpusConfig, cpus: int) -> float:
    """Grow with so many Ray CPUs in this process; return the seconds, Ray's start and stop too."""
    import ray

    from autosparse.integrations.ray import grow, raise_if_failed

    started = time.perf_counter()
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    raise_if_failed(grow(config))
    ray.shutdown()
    return time.perf_counter() - started


def grown(config: CorpusConfig, cpus: int) -> tuple[float, list[float]]:
    """Grow in a fresh process; return its seconds, and each level's own."""
    fresh = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    with tempfile.TemporaryDirectory() as folder, fresh:
        whole = fresh.submit(seconds_to_grow, replace(config, out=folder), cpus).result()
        cards = list(store.Corpus(folder).cards())
    return whole, [entry["seconds"] for card in cards for entry in card["levels"]]


def growing_figures(config: CorpusConfig = EIGHT_RUNS, pairs: int = PAIRS) -> Figures:
    """Measure one worker and two in turn."""
    speedups, overheads = [], []
    for _ in range(pairs):
        alone, _ = grown(config, 1)
        together, levels = grown(config, WORKERS)
        speedups.append(alone / together)
        overheads.append((WORKERS * together - sum(levels)) / len(levels))
    return {
        "two_workers_speedup": figure(speedups, "times as fast", ">= 1.7", "one worker"),
        "driver_seconds_per_level": figure(overheads, "s", "< 1", "none"),
    }


def main() -> None:
    """Measure all of them."""
    publish({**growing_figures(), **training_figures()}, __doc__)


if __name__ == "__main__":
    main()
