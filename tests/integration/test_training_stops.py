"""Training on two ranks told to stop, cut or damaged: it goes on with what is whole."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image
from torch import Tensor

from autosparse.data import sets
from autosparse.data.config import DataConfig
from autosparse.sparsity.ticket import Ticket
from tests.conftest import flip
from tests.data.packed import write_shards
from tests.integration.ranks import ROOT, SCRIPT, ended, launcher, started
from tests.integration.test_training_kills import SETTINGS, newest_step, said, trained, wait_for

LIMIT = 400
"""Seconds after which it is taken to hang."""
STEPS = 42
IMAGES = 20
"""Of a step."""


def settings(out: Path, stage: int, *more: str) -> list[str]:
    """Return arguments of a training of 42 steps; what is said last counts."""
    ema = "0" if stage == 3 else "0.9"
    return [
        *SETTINGS, "--training.epochs", "3", "--training.ema", ema,
        "--deepspeed.zero_stage", str(stage), "--out", str(out), *more,
    ]  # fmt: skip


def finish(arguments: list[str], log: Path, ranks: int = 2, script: Path = SCRIPT) -> str:
    """Train to the end; return what the ranks said."""
    processes = started(arguments, log, ranks, script)
    assert ended(processes, LIMIT), "it hangs"
    assert [process.exitcode for process in processes] == [0] * ranks, said(log)
    return said(log)


def stop_one(arguments: list[str], out: Path, log: Path, ranks: int = 2, workers: int = 0) -> int:
    """Tell the last rank to stop after two checkpoints; return the step at which all did.

    `workers`: how many processes it has that decode images; they are told too.
    """
    processes = started(arguments, log, ranks)
    assert wait_for(out, processes, 2), said(log)
    rank = psutil.Process(processes[-1].pid)
    while len(found := rank.children()) < workers:  # It is between two epochs.
        assert rank.is_running()
    for each in (*(found if workers else []), rank):
        each.terminate()
    assert ended(processes, LIMIT), "it hangs"
    assert [process.exitcode for process in processes] == [75] * ranks, said(log)
    step = newest_step(out)
    assert f"stopped after step {step}; the same command goes on from there" in said(log)
    assert step < STEPS
    return step


@pytest.fixture(scope="module", params=[1, 3])
def unbroken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A ZeRO stage, and the content hash of a training that nothing happened to."""
    folder = tmp_path_factory.mktemp(f"zero{request.param}")
    finish(settings(folder / "whole", request.param), folder / "log")
    return request.param, trained(folder / "whole")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_told_to_stop_both_ranks_save_and_go_on(unbroken, tmp_path: Path) -> None:
    stage, expected = unbroken
    out, log = tmp_path / "out", tmp_path / "log"
    stop_one(settings(out, stage), out, log)
    finish(settings(out, stage), log)
    assert trained(out) == expected


def digits_in_shards(folder: Path) -> Path:
    splits = sets.load(DataConfig(train_limit=280))
    images = (
        (split, png(image), int(label))
        for split in ("train", "validation", "test")
        for image, label in zip(*next(getattr(splits, split).once(2000)), strict=True)
    )
    write_shards(images, folder, [str(digit) for digit in range(10)], per_shard=50)
    return folder


def png(image: Tensor) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image[0].numpy()).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_told_to_stop_with_all_their_processes_ranks_save_and_go_on(tmp_path: Path) -> None:
    """Slurm, systemd and ctrl-C tell those that decode images, too."""
    root = digits_in_shards(tmp_path / "shards")
    shards = ["--data.memory_limit_gb", "0", "--data.workers", "2", "--data.train_limit", "0"]
    for place in ("data", "prune.data"):
        shards += [f"--{place}.name", "shards", f"--{place}.root", str(root)]
        shards += [f"--{place}.image_size", "16"]
    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    stop_one(settings(out, 1, *shards), out, log, ranks=1, workers=2)
    finish(settings(out, 1, *shards), log, ranks=1)
    finish(settings(whole, 1, *shards), log, ranks=1)
    assert trained(out) == trained(whole)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_scattering_again_changes_nothing(unbroken, tmp_path: Path) -> None:
    stage, expected = unbroken
    finish(settings(tmp_path / "out", stage, "--training.rescatter", "true"), tmp_path / "log")
    assert trained(tmp_path / "out") == expected


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("damage", ["a flipped bit", "no end"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path: Path, damage: str) -> None:
    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    stop_one(settings(whole, 1), whole, log)
    shutil.copytree(whole, out)
    finish(settings(whole, 1), log)
    before, last = sorted(out.glob("*/deepspeed/step*"))
    if damage == "no end":
        (last / "checkpoint.json").unlink()
        problem = "it was not written to its end"
    else:
        path = max(last.glob("*optim_states.pt"), key=lambda each: each.stat().st_size)
        flip(path, path.stat().st_size // 2)
        problem = f"{path.name} is not what was written"
    words = finish(settings(out, 1), log)
    assert words.count(f"warning: checkpoint {last} is passed over: {problem}") == 1
    assert f"{before} is passed over" not in words
    assert trained(out) == trained(whole)


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """Return the processes that run the script, in no order."""
    return [
        each for each in psutil.Process(process.pid).children(recursive=True)
        if any(part.startswith("--local_rank") for part in each.cmdline())
        and str(SCRIPT) in each.cmdline()[:3]
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_launcher_gives_the_exit_code_on(tmp_path: Path) -> None:
    """A rank told to stop makes it end with 75, a rank killed with another; then it goes on."""
    out = tmp_path / "out"

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            [*launcher(), str(SCRIPT), *settings(out, 1)],
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    for name in ("kill", "terminate"):
        first = newest_step(out)
        process = start()
        limit = time.monotonic() + LIMIT
        while newest_step(out) <= first:
            assert time.monotonic() < limit and process.poll() is None
            time.sleep(0.02)
        victim = ranks_of(process)[0]
        getattr(victim, name)()
        words = process.communicate(timeout=LIMIT)[1]
        code = process.returncode
        assert (code == 75) if name == "terminate" else code not in (0, 75), words[-2000:]
        assert ("error: stopped after step" in words) is (name == "terminate")
    process = start()
    words = process.communicate(timeout=LIMIT)[1]
    assert process.returncode == 0, words[-2000:]
    whole = tmp_path / "whole"
    finish(settings(whole, 1), tmp_path / "log")
    assert trained(out) == trained(whole)


PLAIN = [
    "--prune.model.name", "test_vit", "--data.augment", "none", "--training.mixup", "0",
    "--prune.model.options", "{patch_size: 4, global_pool: avg}",
    "--training.optimizer_options", "{eps: 1.0e-5}",
]  # fmt: skip
"""Nothing here depends on how a batch is shared out: no batch norm, nothing drawn."""
RECORDER = """
import hashlib, os, runpy, sys
from autosparse.data.memory import MemorySplit

shuffled = MemorySplit.shuffled

def recorded(self, batch_size, **more):
    for images, labels in shuffled(self, batch_size, **more):
        with open({out!r} + os.environ["RANK"], "a") as file:
            file.writelines(hashlib.sha256(i.numpy()).hexdigest() + "\\n" for i in images)
        yield images, labels

MemorySplit.shuffled = recorded
sys.argv[0] = {script!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def images_after(step: int) -> list[str]:
    """Return the hashes of the images of all steps after `step`, in no order."""
    train = sets.load(DataConfig(train_limit=280)).train
    batches = [
        [hashlib.sha256(image.numpy()).hexdigest() for image in images]
        for epoch in range(3)
        for images, _ in train.shuffled(IMAGES, seed=0, epoch=epoch)
    ]
    assert len(batches) == STEPS
    return sorted(name for batch in batches[step:] for name in batch)


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory) -> Ticket:
    """What the plain training gives on one rank that nothing happens to."""
    folder = tmp_path_factory.mktemp("plain")
    finish(settings(folder / "out", 3, *PLAIN), folder / "log", 1)
    return Ticket.load(next(folder.glob("out/*/trained.safetensors")))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("stage", "ranks", "then"), [(0, 2, 1), (1, 2, 1), (3, 2, 1), (1, 1, 2)])
def test_another_number_of_ranks_goes_on_with_the_images_that_remain(
    by_one: Ticket, tmp_path: Path, stage: int, ranks: int, then: int
) -> None:
    out, log, script = tmp_path / "out", tmp_path / "log", tmp_path / "recorder.py"
    arguments = settings(out, stage, *PLAIN, "--training.ema", "0")
    step = stop_one(arguments, out, log, ranks)
    record = tmp_path / "images"
    script.write_text(RECORDER.format(out=str(record), script=str(SCRIPT)))
    finish(arguments, log, then, script)
    seen = [name for path in tmp_path.glob("images*") for name in path.read_text().split()]
    assert sorted(seen) == images_after(step)
    trained(out)
    found = Ticket.load(next(out.glob("*/trained.safetensors")))
    assert found.fingerprint == by_one.fingerprint
    start = Ticket.load(next(out.glob("tickets/*.safetensors")))
    for name, values in by_one.values.items():
        moved = float((values - start.values[name]).abs().max())
        assert moved > 1e-4, name
        assert float((found.values[name] - values).abs().max()) < 0.03 * moved, name
    (result,) = out.glob("*/result.json")
    assert len(json.loads(result.read_text())["history"]) == 3


@pytest.mark.slow
def test_what_zero_3_cannot_is_one_line(tmp_path: Path) -> None:
    mistakes = [["ema", "0.9"], ["grad_checkpointing", "true"], ["compile", "true"]]
    for name, value in mistakes:
        arguments = settings(tmp_path / "out", 3, f"--training.{name}", value)
        processes = started(arguments, tmp_path / "log", 1)
        assert ended(processes, LIMIT)
        assert processes[0].exitcode == 2
        said_last = (tmp_path / "log" / "0").read_text().splitlines()[-1]
        assert said_last == f"error: training.{name} does not work with deepspeed.zero_stage 3"


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "stage"), [("fp16", 0), ("bf16", 1)])
def test_half_precision(tmp_path: Path, precision: str, stage: int) -> None:
    more = [*PLAIN, "--training.precision", precision, "--training.epochs", "1"]
    arguments = settings(tmp_path / "out", stage, *more, "--data.train_limit", "40")
    finish(arguments, tmp_path / "log")
    trained(tmp_path / "out")
    (path,) = tmp_path.glob("out/*/result.json")
    (epoch,) = json.loads(path.read_text())["history"]
    assert 0 < epoch["train_loss"] < 10
