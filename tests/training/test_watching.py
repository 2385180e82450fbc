"""What the bar of a training says, and SIGTERM that is heard and does not kill."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autosparse.core.progress import Bar, Progress
from autosparse.training.watching import Fetched, StepWatch, told_to_stop


def _stepper(updates: int, skipped: int = 0) -> Any:
    return SimpleNamespace(updates=updates, skipped=skipped, learning_rate=lambda: 0.0125)


def test_steps_made_before_do_not_count_for_the_rate() -> None:
    with Progress(enabled=False) as progress:
        watch = StepWatch(progress, "erk")
        watch.begin(made=4, total=10, images=50)
        assert isinstance(watch.bar, Bar)
        assert (watch.bar.total, watch.bar.done, watch.bar.before) == (500, 200, 200)
        watch.stepped(torch.tensor(1.0), _stepper(5), 0.1)
        assert (watch.bar.done, watch.bar.before) == (250, 200)


def test_the_text_says_loss_rate_waiting_and_skipped_steps() -> None:
    with Progress(enabled=False) as progress:
        watch = StepWatch(progress, "erk")
        watch.begin(made=0, total=10, images=50)
        watch.stepped(torch.tensor(0.12345), _stepper(1), 0.256)
        assert watch.bar.description == "erk: loss 0.123, rate 0.013, waits for data 26%"
        watch.last = float("inf")
        watch.stepped(torch.tensor(9.0), _stepper(2), 0.0)
        assert "loss 0.123" in watch.bar.description, "the loss is looked at now and then only"
        watch.last = float("-inf")
        watch.stepped(torch.tensor(0.5), _stepper(3, skipped=2), 0.0)
        assert watch.bar.description.endswith(
            "loss 0.500, rate 0.013, waits for data 0%, 2 skipped"
        )


def test_nobody_waits_for_a_loss_that_is_not_there_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[int] = []
    monkeypatch.setattr(Fetched, "there", lambda fetched: bool(there))
    with Progress(enabled=False) as progress:
        watch = StepWatch(progress, "erk")
        watch.begin(made=0, total=10, images=50)
        for step in (1, 2):
            watch.stepped(torch.tensor(float(step)), _stepper(step), 0.0)
            assert watch.bar.description == "erk"
        there.append(1)
        watch.stepped(torch.tensor(3.0), _stepper(3), 0.0)
        assert "loss 1.000" in watch.bar.description, "the one that was asked for"


def test_sigterm_is_heard_and_the_old_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with told_to_stop() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        assert stop()
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(ZeroDivisionError), told_to_stop() as again:
        assert not again(), "what was said before does not count"
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before
