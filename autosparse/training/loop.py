"""Train and evaluate a model, dense or compact; a `Stepper` makes the steps (see steppers.py)."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from autosparse.core.errors import RunFailed, Stopped, UsageError
from autosparse.core.memory import keep_freed_blocks
from autosparse.data.sets import DataSource, Split
from autosparse.data.source import Batch
from autosparse.models.zoo import device_of
from autosparse.training.checks import check, check_batches
from autosparse.training.config import TrainingConfig
from autosparse.training.optimizers import advance
from autosparse.training.steppers import Epoch, History, Ranks, Stepper, autocast

EVALUATION_BATCH = 256
EVALUATION_PIXELS = 1 << 21
"""On a GPU a batch may be larger: as many images as have so many pixels (32 of 256 x 256). Only
speed and memory hang on it."""
REMEDY = "lower training.learning_rate or set training.clip_grad"
"""What helps against a loss that is not finite."""


def steps_per_epoch(train: Split, config: TrainingConfig, world_size: int = 1) -> int:
    """Return the steps of an epoch; raise UsageError if the images do not fill one batch."""
    check(config)
    check_batches(config, world_size)
    steps = train.steps(config.batch_size // world_size, world_size)
    if not steps:
        raise UsageError(f"batch_size {config.batch_size} is more than the {len(train)} images")
    return steps


def training_images(train: Split, config: TrainingConfig, world_size: int = 1) -> int:
    """Return how many images a whole training processes over all ranks; each epoch counts its
    images again."""
    return steps_per_epoch(train, config, world_size) * config.batch_size * config.epochs


@dataclass(frozen=True)
class Span:
    """Part of a training, in steps of the whole; the order of images is that of the whole too."""

    first: int = 0
    """Steps that count as made already."""
    last: int | None = None
    """Stop after so many steps and evaluate once, then; None: after all epochs, each evaluated."""


class Watch:
    """Called as a training goes on; this one does nothing, see watching.py for one that shows."""

    def begin(self, made: int, total: int, images: int) -> None:
        """Begin, with the steps made before, the steps in all, and the images of a step."""

    def stepped(self, loss: Tensor, stepper: Stepper, wait_share: float) -> None:
        """Note a step: its loss, on the device, and the share of time spent waiting for images."""


def fit(
    stepper: Stepper,
    source: DataSource,
    config: TrainingConfig,
    *,
    seed: int,
    folder: Path | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    span: Span | None = None,
    on_step: Callable[[int], None] | None = None,
    watch: Watch | None = None,
    stop: Callable[[], bool] | None = None,
) -> History:
    """Train for `config.epochs`, going on from the checkpoint in `folder` if there is one.

    The order of images and their augmentation come from (seed, epoch), so that a run that was
    interrupted goes on with the images that remain, and ends as an unbroken one does. Raises
    RunFailed, naming the step, on a loss that is not finite.

    Args:
        stepper: makes the steps.
        source: the data.
        config: how to train.
        seed: of the order of images and of augmentation.
        folder: where checkpoints are.
        on_epoch: called after every epoch, evaluation included.
        span: the steps to make, if not all of them.
        on_step: called after every step with the number of steps made.
        watch: called at the start and after every step.
        stop: asked after every step; if True, a checkpoint is written and Stopped raised.
    """
    if device_of(stepper.model).type == "cpu":
        keep_freed_blocks()
    with same_bits(config.deterministic):
        return _Fit(
            stepper, source, config, seed, folder, on_epoch, span or Span(), on_step,
            watch or Watch(), stop or (lambda: False),
        ).run()  # fmt: skip


@dataclass
class _Fit:
    """The arguments of `fit`, and the state of the present epoch."""

    stepper: Stepper
    source: DataSource
    config: TrainingConfig
    seed: int
    folder: Path | None
    on_epoch: Callable[[Epoch], None] | None
    span: Span
    on_step: Callable[[int], None] | None
    watch: Watch
    stop: Callable[[], bool]

    def run(self) -> History:
        """Train, epoch by epoch."""
        stepper, span = self.stepper, self.span
        stepper.seed = self.seed
        self.per_epoch = steps_per_epoch(self.source.train, self.config, stepper.ranks.world_size)
        epochs = self.config.epochs if span.last is None else -(-span.last // self.per_epoch)
        last = span.last or epochs * self.per_epoch
        if span.first >= last:
            raise UsageError(
                f"training starts after step {span.first} and has {last} steps; "
                "train for more epochs"
            )
        saved = stepper.load(self.folder) if self.folder else None
        if saved is None:
            stepper.updates = span.first
            advance(stepper.scheduler, span.first)
        self.history = saved or History()
        self.watch.begin(stepper.updates, last, self.config.batch_size)
        for epoch in range(span.first // self.per_epoch + len(self.history.epochs), epochs):
            self.started = time.perf_counter() - self.history.seconds_before
            self.train(epoch)
            if span.last is None or epoch + 1 == epochs:
                self.finish(epoch)
            self.history.losses, self.history.seconds_before = [], 0.0
            every = self.config.checkpoint_epochs
            if every and epoch + 1 < epochs and (epoch + 1) % every == 0:
                self.save()
        return self.history

    def train(self, epoch: int) -> None:
        """Make the epoch's steps that remain, without waiting for the device."""
        before = epoch * self.per_epoch
        first = max(self.span.first - before, 0) + len(self.history.losses)
        self.losses: list[Tensor] = []
        self.made, self.waited, self.begun = 0, 0.0, time.perf_counter()
        self.stepper.model.train()
        for number, (images, labels) in enumerate(self.images(epoch, first), start=before + first):
            if self.span.last is not None and number >= self.span.last:
                break
            self.losses.append(self.stepper.step(images, labels))
            self.made += 1
            share = self.waited / max(time.perf_counter() - self.begun, 1e-9)
            self.watch.stepped(self.losses[-1], self.stepper, share)
            if self.on_step:
                self.on_step(number + 1)
            self.pause(more=number + 1 < before + self.per_epoch)
        self.check()
        self.trained = max(time.perf_counter() - self.begun, 1e-9)

    def images(self, epoch: int, first: int) -> Iterator[Batch]:
        """Yield the epoch's batches from step `first` on, augmented and normalised."""
        ranks = self.stepper.ranks
        each = self.config.batch_size // ranks.world_size
        generator = self.source.augmentation(self.seed, epoch, ranks.rank)
        self.source.skip(generator, each, first)
        batches = self.source.train.shuffled(
            each, seed=self.seed, epoch=epoch, rank=ranks.rank, world_size=ranks.world_size,
            first=first,
        )  # fmt: skip
        asked = time.perf_counter()
        for images, labels in batches:
            came = time.perf_counter()
            prepared = self.source.prepare(images, generator)
            # A GPU prepares images after the steps before them; that time is no waiting for data.
            self.waited += (came if images.is_cuda else time.perf_counter()) - asked
            yield prepared, labels
            asked = time.perf_counter()

    def pause(self, *, more: bool) -> None:
        """Write a checkpoint if one is due within the epoch; raise Stopped if asked to stop."""
        stop, every = self.stop(), self.config.checkpoint_steps
        if (stop or (every and self.stepper.updates % every == 0)) and (more or stop):
            self.check()
            self.save()
        if stop:
            raise Stopped(
                f"stopped after step {self.stepper.updates}; the same command goes on from there"
            )

    def check(self) -> None:
        """Move the losses to the CPU; raise RunFailed at the first that is not finite.

        A rank's loss is that of its own images: what is not finite on one is told on all, where
        the others would wait for it.
        """
        if not self.losses:
            return
        losses = torch.stack(self.losses)
        values = losses.tolist()
        ranks = self.stepper.ranks.world_size
        mean = losses.double()
        if ranks > 1:
            torch.distributed.all_reduce(mean)
        for place, value in enumerate((mean / ranks).tolist()):
            if not math.isfinite(value):
                step = self.stepper.updates - len(values) + place + 1
                raise RunFailed(
                    f"the loss is {value} at step {step} (epoch {-(-step // self.per_epoch)}); "
                    f"{REMEDY}"
                ).on_all_ranks()
        self.history.losses += values
        self.losses = []

    def finish(self, epoch: int) -> None:
        """Evaluate the epoch and add it to the history."""
        stepper, source, losses = self.stepper, self.source, self.history.losses
        result = evaluate(
            stepper.evaluated(), source, source.validation, stepper.ranks, self.config
        )
        self.history.epochs.append(
            Epoch(
                epoch=epoch + 1,
                train_loss=sum(losses) / len(losses),
                validation_loss=result.loss,
                validation_accuracy=result.accuracy,
                learning_rate=stepper.learning_rate(),
                seconds=time.perf_counter() - self.started,
                images_per_second=self.made * self.config.batch_size / self.trained,
                data_wait_share=self.waited / self.trained,
                skipped_steps=getattr(stepper, "skipped", 0),
            )
        )
        if self.on_epoch:
            self.on_epoch(self.history.epochs[-1])

    def save(self) -> None:
        """Write a checkpoint, if there is a folder for it."""
        if self.folder:
            if self.history.losses:
                self.history.seconds_before = time.perf_counter() - self.started
            self.stepper.save(self.folder, self.history)


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy (0 to 1) over every image of a split, each counted once."""

    loss: float
    accuracy: float
    images: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    source: DataSource,
    split: Split,
    ranks: Ranks | None = None,
    config: TrainingConfig | None = None,
) -> Evaluation:
    """Evaluate on a split, shared out over the ranks; every rank gets the same result.

    The precision is that of `config`, as in training; by default the model's own. The model stays
    in eval mode. Ranks talk only after their last batch, so that they may have different numbers.
    Raises RunFailed, on every rank, where the loss is not finite.
    """
    ranks = ranks or Ranks()
    model.eval()
    device = next(model.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for images, labels in split.once(
        evaluation_batch(device, source.image_size), rank=ranks.rank, world_size=ranks.world_size
    ):
        with autocast(config or TrainingConfig(), device):
            outputs = model(source.prepare(images)).float()
        sums[0] += nn.functional.cross_entropy(outputs, labels, reduction="sum")
        sums[1] += (outputs.argmax(1) == labels).sum()
        sums[2] += len(labels)
    if ranks.world_size > 1:
        torch.distributed.all_reduce(sums)
    loss, right, images = sums.tolist()
    if not images:
        raise UsageError("there is no image to evaluate on")
    if not math.isfinite(loss):
        message = f"the loss over {int(images)} held-out images is {loss}; {REMEDY}"
        raise RunFailed(message).on_all_ranks()
    return Evaluation(loss / images, right / images, int(images))


def evaluation_batch(device: torch.device, side: int) -> int:
    """Return how many images of `side` pixels are evaluated at a time."""
    if device.type != "cuda":
        return EVALUATION_BATCH
    return max(EVALUATION_BATCH, EVALUATION_PIXELS // side**2)


@contextmanager
def same_bits(enabled: bool) -> Iterator[None]:
    """Run with kernels that give the same bits every time; torch warns where it has none.

    cuBLAS reads its setting from the environment when it is first used.
    """
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    algorithms = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn
    fill = torch.utils.deterministic.fill_uninitialized_memory
    before = cudnn.deterministic, cudnn.benchmark, fill
    torch.use_deterministic_algorithms(True, warn_only=True)
    cudnn.deterministic, cudnn.benchmark = True, False
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms, warn_only=only_warned)
        cudnn.deterministic, cudnn.benchmark, fill = before
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[assignment]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with the global RNGs (dropout, stochastic depth) at `seed`; put them back afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
