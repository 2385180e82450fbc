"""Training on two ranks told to stop, cut or damaged: it goes on with what is whole."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from autosparse.ticket import Ticket
from tests.conftest import flip
from tests.integration.ranks import ROOT, SCRIPT, ended, free_port, launcher, started
from tests.integration.test_training_kills import SETTINGS, newest_step, said, trained, wait_for

SHORT = ["--training.epochs", "3"]
"""42 steps."""
LIMIT = 200


def settings(out: Path, stage: int, *more: str) -> list[str]:
    """What is said last counts; a moving average does not go with ZeRO 3."""
    ema = "0" if stage == 3 else "0.9"
    return [
        *SETTINGS, *SHORT, "--deepspeed.zero_stage", str(stage), "--training.ema", ema,
        "--out", str(out), *more,
    ]  # fmt: skip


def finish(arguments: list[str], log: Path, ranks: int = 2) -> str:
    """Train to the end; return what the ranks said."""
    processes = started(arguments, log, ranks)
    assert ended(processes, LIMIT), "it hangs"
    assert [process.exitcode for process in processes] == [0] * ranks, said(log)
    return said(log)


def stop_one(arguments: list[str], out: Path, log: Path) -> int:
    """Tell rank 1 to stop after two checkpoints; return the step at which both did."""
    processes = started(arguments, log)
    assert wait_for(out, processes, 2), said(log)
    processes[1].terminate()
    assert ended(processes, LIMIT), "it hangs"
    assert [process.exitcode for process in processes] == [75, 75], said(log)
    step = newest_step(out)
    assert f"stopped after step {step}; the same command goes on from there" in said(log)
    return step


@pytest.fixture(scope="module", params=[0, 1, 3])
def unbroken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A ZeRO stage, and the folder of a training that nothing happened to."""
    folder = tmp_path_factory.mktemp(f"zero{request.param}")
    finish(settings(folder / "whole", request.param), folder / "log")
    return request.param, folder / "whole"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_told_to_stop_all_ranks_save_and_any_number_goes_on(unbroken, tmp_path: Path) -> None:
    """On the same number of ranks bit for bit; on one, with the images that remain."""
    stage, whole = unbroken
    same, fewer, log = tmp_path / "same", tmp_path / "fewer", tmp_path / "log"
    assert stop_one(settings(same, stage), same, log) < 42
    finish(settings(same, stage), log)
    expected = trained(whole)
    assert trained(same) == expected
    images = tmp_path / "images"
    step = stop_one(settings(fewer, stage), fewer, log)
    recorded(settings(fewer, stage), images)
    trained(fewer)
    assert images.read_text().split() == images_of(whole, after=step)
    found, wanted = (
        Ticket.load(next(out.glob("*/trained.safetensors"))).values for out in (fewer, whole)
    )
    for name, values in wanted.items():
        assert torch.allclose(found[name], values, atol=0.2), name
