"""What fails on one of two ranks is told on both, before the other waits for it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autosparse.core.errors import Stopped, UsageError
from autosparse.integrations import deepspeed, launched
from autosparse.study import plan
from autosparse.training.steppers import Ranks
from tests.integration.failures_on_ranks import asked, failing, lossy, studied
from tests.integration.ranks import Group
from tests.study.small import comparison

SOON = 20
"""Seconds: a rank that waits for one that has raised would wait for minutes."""


def test_a_loss_of_one_rank_that_is_not_finite_is_told_on_both(group: Group) -> None:
    for said in group.call(lossy, seconds=SOON):
        assert said.startswith("the loss is inf at step 3 (epoch 1); lower")


def test_an_error_that_is_no_users_is_told_on_both(group: Group) -> None:
    first, second = group.call(asked, seconds=SOON)
    assert first == ["OSError: no space left", "RunFailed: rank 1 failed: OSError: no space left"]
    assert second == ["RunFailed: rank 0 failed: OSError: no space left", "OSError: no space left"]


@pytest.mark.parametrize("where", ["there", "load", "claim", "disk"])
def test_what_fails_on_one_rank_in_a_training_is_told_on_both(
    group: Group, tmp_path: Path, where: str
) -> None:
    error = "UsageError" if where == "load" else "RunFailed"
    assert group.call(failing, tmp_path, where, seconds=SOON) == [f"{error}: no {where}"] * 2


def test_a_cell_that_fails_does_not_hold_up_the_others(group: Group, tmp_path: Path) -> None:
    settings = comparison(
        tmp_path, criteria=["magnitude"], seeds=[0], twins=[], executor="deepspeed",
        variations=[{"optimizer": "sgd", "learning_rate": 1e30}, {}],
    )  # fmt: skip
    group.call(studied, settings)
    cells = plan.cells(settings)
    assert [cell.state for cell in cells] == ["failed"] * 2 + ["finished"] * 2
    assert all("the loss" in cell.error() for cell in cells[:2])


@pytest.mark.parametrize("everywhere", [True, False])
def test_only_an_error_of_all_ranks_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, everywhere: bool
) -> None:
    """Of a bad image, say, the other ranks do not know: they are in the middle of a step."""
    waits = []

    def fail(*_: Any, **__: Any) -> None:
        error = UsageError("bad")
        raise error.on_all_ranks() if everywhere else error

    monkeypatch.setattr(deepspeed, "train_cell", fail)
    monkeypatch.setattr(deepspeed.dist, "barrier", lambda: waits.append("waits"))
    nothing: Any = None
    stop: Any = SimpleNamespace(answer=lambda: None)
    with pytest.raises(UsageError):
        deepspeed.train_one(nothing, nothing, nothing, Ranks(), "cpu", stop, nothing)
    assert bool(waits) == everywhere


RANK = """
import pathlib, signal, sys, time
def stop(*_):
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1]).write_text("at work")
time.sleep(60)
"""


def test_told_to_stop_it_tells_the_ranks_and_waits_for_them(tmp_path: Path) -> None:
    told = tmp_path / "told"

    def tell() -> None:
        while not told.is_file():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=tell).start()
    with pytest.raises(Stopped):
        launched.launched([sys.executable, "-c", RANK, str(told)], dict(os.environ))
    assert told.read_text() == "saved"
    assert launched.launched([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ)) == 3
