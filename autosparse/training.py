"""Train and evaluate a model, dense or compact, in one process.

The loop knows nothing of how a step is made: a `Stepper` does that. `PlainStepper` is plain
PyTorch; integrations/deepspeed.py has the one for DeepSpeed.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from autosparse.compaction import MARK
from autosparse.config import TrainingConfig
from autosparse.data import DataSource, Split
from autosparse.errors import RunFailed, UsageError, unknown
from autosparse.files import write_bytes
from autosparse.models import device_of

EVALUATION_BATCH = 256
PRECISIONS = ("fp32", "bf16")
SCHEDULES = ("cosine", "tanh", "poly", "none")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those that train together."""

    rank: int = 0
    world_size: int = 1


@dataclass
class Epoch:
    """What one epoch of training gave."""

    epoch: int
    train_loss: float
    validation_loss: float
    validation_accuracy: float
    """0 to 1."""
    learning_rate: float
    seconds: float


@dataclass
class History:
    """All epochs so far, and the seconds that training has taken."""

    epochs: list[Epoch] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(epoch.seconds for epoch in self.epochs)

    def plain(self) -> list[dict[str, float]]:
        return [vars(epoch) for epoch in self.epochs]


class Stepper(Protocol):
    """How one step is made, and how its state is kept."""

    ranks: Ranks
    scheduler: Any
    updates: int
    """Steps made so far."""

    @property
    def model(self) -> nn.Module:
        """What evaluation calls: images -> outputs."""
        ...

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Make one optimizer step on this rank's images; return the loss, detached."""
        ...

    def learning_rate(self) -> float:
        """Return the rate of the last step."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return the whole state dict of the trained module, on every rank."""
        ...

    def save(self, folder: Path, history: History) -> None:
        """Write all that is needed to go on from here."""
        ...

    def load(self, folder: Path) -> History | None:
        """Go back to the last save in `folder`; None if there is none."""
        ...


class PlainStepper:
    """One process, plain PyTorch."""

    def __init__(self, model: nn.Module, config: TrainingConfig, steps_per_epoch: int) -> None:
        self.model, self.config, self.ranks = model, config, Ranks()
        self.optimizer, self.scheduler = optimizer_and_schedule(model, config, steps_per_epoch)
        self.loss_fn = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self.updates = 0
        if config.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network = torch.compile(model) if config.compile else model

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast(self.config, images.device):
            loss = self.loss_fn(self.network(images).float(), labels)
        loss.backward()
        if self.config.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        advance(self.scheduler, self.updates)
        return loss.detach()

    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def save(self, folder: Path, history: History) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
            "rng": torch.get_rng_state(),
            "history": history.plain(),
        }
        whole = io.BytesIO()
        torch.save(state, whole)
        write_bytes(folder / "checkpoint.pt", whole.getvalue())

    def load(self, folder: Path) -> History | None:
        path = folder / "checkpoint.pt"
        if not path.is_file():
            return None
        state = torch.load(path, map_location=device_of(self.model), weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())
        self.updates = state["updates"]
        advance(self.scheduler, self.updates)
        return History([Epoch(**epoch) for epoch in state["history"]])


def check(config: TrainingConfig) -> None:
    """Raise UsageError for settings that cannot be."""
    if config.optimizer not in list_optimizers():
        raise unknown("optimizer", config.optimizer, [str(each) for each in list_optimizers()])
    if config.schedule not in SCHEDULES:
        raise unknown("schedule", config.schedule, SCHEDULES)
    if config.precision not in PRECISIONS:
        raise unknown("precision", config.precision, PRECISIONS)
    for name in ("epochs", "batch_size"):
        if getattr(config, name) < 1:
            raise UsageError(f"training.{name} must be at least 1, got {getattr(config, name)}")


def optimizer_and_schedule(
    model: nn.Module, config: TrainingConfig, steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, Any]:
    """Build timm's optimizer and scheduler; the scheduler is None for a constant rate.

    timm exempts 1-D parameters from weight decay; compact weights are 1-D and yet weights, so
    the groups are made here.
    """
    check(config)
    try:
        optimizer = create_optimizer_v2(
            parameter_groups(model, config.weight_decay),  # type: ignore[arg-type]
            opt=config.optimizer,
            lr=config.learning_rate,
            weight_decay=0.0,
            **config.optimizer_options,
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"optimizer {config.optimizer}: {error}") from None
    if config.schedule == "none":
        return optimizer, None
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.schedule,
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]
        warmup_prefix=False,
        warmup_lr=0.0,
        min_lr=0.0,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    advance(scheduler, 0)
    return optimizer, scheduler


def advance(scheduler: Any, updates: int) -> None:
    """Set the rate for the step after `updates` steps."""
    if scheduler is not None:
        scheduler.step_update(updates)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups: weights, which decay, and biases, norms and what timm exempts."""
    exempt = set(getattr(model, "no_weight_decay", set)())
    decay, none = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        weight = parameter.ndim > 1 or MARK in name
        (decay if weight and name not in exempt else none).append(parameter)
    groups = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": none, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def autocast(config: TrainingConfig, device: torch.device) -> torch.autocast:
    """Return the autocast context that `precision` asks for."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def steps_per_epoch(train: Split, config: TrainingConfig, world_size: int = 1) -> int:
    """Return the steps of an epoch; raise UsageError if the images do not fill one batch."""
    check(config)
    if config.batch_size % world_size:
        raise UsageError(f"batch_size {config.batch_size} does not divide by {world_size} ranks")
    steps = train.steps(config.batch_size // world_size, world_size)
    if not steps:
        raise UsageError(f"batch_size {config.batch_size} is more than the {len(train)} images")
    return steps


@dataclass(frozen=True)
class Span:
    """Part of a training: from after step `first` (the order of images goes on from there)."""

    first: int = 0
    """Steps that are taken to be made already."""
    last: int | None = None
    """Stop after so many steps, evaluated once, at the end; by default after all epochs."""


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
) -> History:
    """Train for `config.epochs`, going on from the checkpoint in `folder` if there is one.

    The order of images and their augmentation come from (seed, epoch), so a run that was cut
    short ends as the unbroken one does. Raises RunFailed, naming the step, on a NaN loss.

    Args:
        stepper: makes the steps.
        source: the data.
        config: how to train.
        seed: of the order of images and of augmentation.
        folder: where checkpoints are.
        on_epoch: called after every epoch, evaluation included.
        span: the steps to make, if not all of them.
        on_step: called after every step with the number of steps made.
    """
    span = span or Span()
    history = stepper.load(folder) if folder else None
    if history is None:
        history, stepper.updates = History(), span.first
        advance(stepper.scheduler, span.first)
    per_epoch = steps_per_epoch(source.train, config, stepper.ranks.world_size)
    skipped = span.first // per_epoch
    epochs = config.epochs if span.last is None else -(-span.last // per_epoch)
    if span.first >= (span.last or epochs * per_epoch):
        raise UsageError(
            f"training starts after step {span.first} and has {span.last or epochs * per_epoch} "
            "steps; train for more epochs"
        )
    for epoch in range(skipped + len(history.epochs), epochs):
        started = time.perf_counter()
        loss = _train_epoch(stepper, source, config, seed, epoch, span, on_step)
        if span.last is not None and epoch + 1 < epochs:
            continue
        result = evaluate(stepper.model, source, source.validation, stepper.ranks)
        history.epochs.append(
            Epoch(
                epoch=epoch + 1,
                train_loss=loss,
                validation_loss=result.loss,
                validation_accuracy=result.accuracy,
                learning_rate=stepper.learning_rate(),
                seconds=time.perf_counter() - started,
            )
        )
        if on_epoch:
            on_epoch(history.epochs[-1])
        every, more = config.checkpoint_epochs, epoch + 1 < epochs
        if folder and every and more and (epoch + 1) % every == 0:
            stepper.save(folder, history)
    return history


def _train_epoch(
    stepper: Stepper,
    source: DataSource,
    config: TrainingConfig,
    seed: int,
    epoch: int,
    span: Span,
    on_step: Callable[[int], None] | None,
) -> float:
    """Train one epoch without waiting for the device; return the mean loss of this rank."""
    ranks = stepper.ranks
    generator = source.augmentation(seed, epoch, ranks.rank)
    batches = source.train.shuffled(
        config.batch_size // ranks.world_size,
        seed=seed,
        epoch=epoch,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    stepper.model.train()
    before = epoch * steps_per_epoch(source.train, config, ranks.world_size)
    losses = []
    for number, (images, labels) in enumerate(batches, start=before):
        if span.last is not None and number >= span.last:
            break
        pixels = source.prepare(images, generator)
        if number < span.first:
            continue
        losses.append(stepper.step(pixels, labels))
        if on_step:
            on_step(number + 1)
    values = torch.stack(losses).tolist()
    for place, value in enumerate(values):
        if not math.isfinite(value):
            step = max(before, span.first) + place + 1
            raise RunFailed(
                f"the loss is {value} at step {step} (epoch {epoch + 1}); "
                "lower training.learning_rate or set training.clip_grad"
            )
    return sum(values) / len(values)


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy (0 to 1) over every image of a split, each counted once."""

    loss: float
    accuracy: float
    images: int


@torch.no_grad()
def evaluate(
    model: nn.Module, source: DataSource, split: Split, ranks: Ranks | None = None
) -> Evaluation:
    """Evaluate on a split, shared out over the ranks; every rank gets the same result.

    The model stays in eval mode. There are no collectives before the last batch, so ranks may
    have different numbers of batches.
    """
    ranks = ranks or Ranks()
    model.eval()
    device = next(model.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for images, labels in split.once(
        EVALUATION_BATCH, rank=ranks.rank, world_size=ranks.world_size
    ):
        outputs = model(source.prepare(images)).float()
        sums[0] += nn.functional.cross_entropy(outputs, labels, reduction="sum")
        sums[1] += (outputs.argmax(1) == labels).sum()
        sums[2] += len(labels)
    if ranks.world_size > 1:
        torch.distributed.all_reduce(sums)
    loss, right, images = sums.tolist()
    if not images:
        raise UsageError("there is no image to evaluate on")
    return Evaluation(loss / images, right / images, int(images))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with the global RNGs (dropout, stochastic depth) at `seed`; put them back afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
