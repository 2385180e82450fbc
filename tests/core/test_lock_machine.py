"""Claims in any order: processes that claim, release, die and take over, against a plain model."""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from autosparse.core.errors import UsageError
from autosparse.core.locks import claimed

FORK = multiprocessing.get_context("fork")
WORKERS, FOLDERS = range(2), ("a", "b/c")


def worker(pipe: Connection, root: Path) -> None:
    """Claim and release folders as told, until killed."""
    held: dict[str, ExitStack] = {}
    while True:
        action, folder = pipe.recv()
        if action == "release":
            held.pop(folder).close()
            pipe.send("released")
            continue
        stack = ExitStack()
        try:
            stack.enter_context(claimed(root / folder))
        except UsageError as error:
            pipe.send(str(error))
        else:
            held[folder] = stack
            pipe.send("claimed")


class Worker:
    """A process that does what it is told."""

    def __init__(self, root: Path) -> None:
        self.pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=worker, args=(theirs, root), daemon=True)
        self.process.start()
        theirs.close()

    def told(self, action: str, folder: str) -> str:
        self.pipe.send((action, folder))
        assert self.pipe.poll(60), f"{action} {folder} hangs"
        return self.pipe.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL
        self.pipe.close()


class Claims(RuleBasedStateMachine):
    """What is known of each folder: nobody, a worker that lives, or one that died holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory()
        self.root = Path(self.temporary.name)
        self.workers = [Worker(self.root) for _ in WORKERS]
        self.owners: dict[str, int] = {}

    @rule(number=st.sampled_from(WORKERS), folder=st.sampled_from(FOLDERS))
    def claim(self, number: int, folder: str) -> None:
        said = self.workers[number].told("claim", folder)
        if folder in self.owners:
            owner = self.workers[self.owners[folder]].process.pid
            assert f"is being worked on by process {owner} on " in said
            return
        assert said == "claimed"
        self.owners[folder] = number

    @precondition(lambda self: self.owners)
    @rule(choose=st.randoms(use_true_random=False))
    def release(self, choose) -> None:
        folder = choose.choice(sorted(self.owners))
        assert self.workers[self.owners.pop(folder)].told("release", folder) == "released"

    @rule(number=st.sampled_from(WORKERS))
    def die(self, number: int) -> None:
        """What it held is free for the other or for its successor."""
        self.workers[number].kill()
        self.owners = {folder: owner for folder, owner in self.owners.items() if owner != number}
        self.workers[number] = Worker(self.root)

    @invariant()
    def what_is_held_is_there(self) -> None:
        assert all((self.root / folder).is_dir() for folder in self.owners)

    def teardown(self) -> None:
        for each in self.workers:
            each.kill()
        with ExitStack() as stack:  # All are dead: whatever they held can be had.
            for folder in FOLDERS:
                stack.enter_context(claimed(self.root / folder))
        assert not list(self.root.rglob("*.json")), "a claim outlives its owner"
        self.temporary.cleanup()


TestClaims: Callable = Claims.TestCase
TestClaims.settings = settings(max_examples=8, stateful_step_count=10)
