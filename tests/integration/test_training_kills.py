"""Kills of one rank or both, twenty (five with RigL): it ends as the unbroken training does."""

from __future__ import annotations

import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from autosparse.core.files import read_json
from autosparse.sparsity.ticket import Ticket
from tests.integration.ranks import end, ended, started

KILLS, SEED = 20, 7
RIGL = ["--training.topology", "rigl", "--training.topology_every", "3"]
"""Indices are exchanged at every third step until step 504 of 672; checkpoints are every fourth."""
LIMIT = 300
"""Seconds after which a start is taken to hang."""
STEPS = 14
"""Of an epoch, of 20 images each."""
EPOCHS = 48
"""So many that a fast machine does not end before the last kill: 16 took 6 s on one."""
SETTINGS = [
    "--data.name", "digits", "--data.train_limit", "280", "--training.batch_size", "20",
    "--training.epochs", str(EPOCHS), "--training.checkpoint_epochs", "0", "--training.ema", "0.9",
    "--training.checkpoint_steps", "4", "--training.mixup", "0.5", "--deepspeed.zero_stage", "1",
    "--prune.criterion", "snip", "--prune.sparsity", "0.9", "--prune.data.name", "digits",
    "--prune.data.train_limit", "280", "--prune.model.name", "test_byobnet",
    "--prune.model.options", "{drop_rate: 0.1}", "--tracking", "false",
]  # fmt: skip


def trained(out: Path) -> str:
    """Return the content hash of the one trained ticket; nothing else may be left."""
    (path,) = out.glob("*/trained.safetensors")
    assert len(list(out.glob("*/result.json"))) == 1
    assert not list(out.rglob("deepspeed")), "checkpoints are left"
    assert not list(out.rglob("*.tmp")), "temporary files are left"
    return Ticket.load(path).content_hash


def updates(*outs: Path) -> list[list[dict]]:
    """Return what the trained tickets' cards tell of exchanges of their topologies."""
    tickets = [Ticket.load(path) for out in outs for path in out.glob("*/trained.safetensors")]
    return [ticket.card.get("topology", {}).get("updates", []) for ticket in tickets]


def newest_step(out: Path) -> int:
    """Return the step of the newest whole checkpoint; 0 if there is none."""
    found = [int(path.parent.name[4:]) for path in out.glob("*/deepspeed/step*/checkpoint.json")]
    return max(found, default=0)


def alive(processes: list[BaseProcess]) -> bool:
    return all(process.exitcode is None for process in processes)


def wait_for(out: Path, processes: list[BaseProcess], checkpoints: int) -> bool:
    """Wait for so many new checkpoints; return whether all ranks are at work then."""
    limit, seen = time.monotonic() + LIMIT, {newest_step(out)}
    while len(seen) <= checkpoints and alive(processes):
        assert time.monotonic() < limit, "it hangs"
        time.sleep(0.02)
        seen.add(newest_step(out))
    return alive(processes)


def said(log: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in sorted(log.iterdir()))


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("kills", "least", "more"), [(KILLS, 3, []), (5, 1, RIGL)])
def test_a_training_survives_kills(tmp_path: Path, kills: int, least: int, more: list[str]) -> None:
    settings = [*SETTINGS, *more]
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "log"
    unbroken = started([*settings, "--out", str(whole)], log)
    assert ended(unbroken, LIMIT), "it hangs"
    assert [process.exitcode for process in unbroken] == [0, 0], said(log)
    expected = trained(whole)
    chance = random.Random(SEED)
    killed = {"rank 0": 0, "rank 1": 0, "both": 0}
    arguments = [*settings, "--out", str(broken)]
    while sum(killed.values()) < kills:
        before = newest_step(broken)
        processes = started(arguments, log)
        wanted = chance.choice([0, 0, 1, 2])
        at_work = wait_for(broken, processes, wanted)
        time.sleep(chance.uniform(0, 3 if wanted == 0 else 0.3))
        if not at_work or not alive(processes):
            break
        whom = chance.choice(list(killed))
        for rank in {"rank 0": [0], "rank 1": [1], "both": [0, 1]}[whom]:
            processes[rank].kill()
        if wanted:  # Past its start a rank sees by itself that the other is gone.
            assert ended(processes, 60), "the other rank hangs"
        end(processes)
        assert all(process.exitcode != 0 for process in processes), said(log)
        assert newest_step(broken) >= before, "a whole checkpoint is gone"
        assert not list(broken.glob("*/result.json"))
        killed[whom] += 1
    assert sum(killed.values()) == kills, f"it ended after {killed}: {said(log)}"
    assert min(killed.values()) >= least
    last = started(arguments, log)
    assert ended(last, LIMIT), "it hangs"
    assert [process.exitcode for process in last] == [0, 0], said(log)
    assert trained(broken) == expected
    assert [len(each) for each in updates(whole, broken)] == [167 if more else 0] * 2
    (result,) = (read_json(path) for path in broken.glob("*/result.json"))
    assert len(result["history"]) == EPOCHS
