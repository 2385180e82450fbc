"""A progress bar of a training: images per second, time left, loss, rate and skipped steps."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from autosparse.core.progress import Progress
from autosparse.training.loop import Watch
from autosparse.training.steppers import Stepper

EVERY = 2.0
"""Seconds between two readings of the loss, often enough for a person who watches."""


class Fetched:
    """A number that is being copied from its device, without waiting for the copy."""

    def __init__(self, number: Tensor) -> None:
        self.number, self.event = number.to("cpu", non_blocking=True), None
        if number.is_cuda:
            self.event = torch.cuda.Event()
            self.event.record()

    def there(self) -> bool:
        """Return whether the copy is finished."""
        return self.event is None or self.event.query()


class StepWatch(Watch):
    """A bar that counts images; its text has the loss and the rates."""

    def __init__(self, progress: Progress, name: str) -> None:
        self.progress, self.name, self.last = progress, name, 0.0
        self.loss: Fetched | None = None

    def begin(self, made: int, total: int, images: int) -> None:
        self.images = images
        self.bar = self.progress.bar(self.name, total * images, "images")
        self.bar.start_at(made * images)

    def stepped(self, loss: Tensor, stepper: Stepper, wait_share: float) -> None:
        now = time.monotonic()
        if self.loss is None and now - self.last >= EVERY:
            self.last, self.loss = now, Fetched(loss)
        if self.loss is not None and self.loss.there():
            value, self.loss = float(self.loss.number), None
            skipped = getattr(stepper, "skipped", 0)
            self.bar.describe(
                f"{self.name}: loss {value:.3f}, rate {stepper.learning_rate():.2g}, "
                f"waits for data {wait_share:.0%}" + (f", {skipped} skipped" if skipped else "")
            )
        self.bar.set(stepper.updates * self.images)


@contextmanager
def told_to_stop() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether SIGTERM has come; inside, it does not kill the process."""
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        yield lambda: bool(told)
    finally:
        signal.signal(signal.SIGTERM, before)
