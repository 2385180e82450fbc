"""Runs cut anywhere, in any order: no finished level is done again, and nothing is lost."""

from __future__ import annotations

import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from autosparse.core.locks import claimed
from autosparse.corpus import store
from autosparse.data.config import DataConfig
from autosparse.irp.run import run_folder, run_irp
from tests.conftest import quick_irp

SEEDS, LEVELS = (0, 1), 2
EVENTS = ("epoch", "level")
"""Where a run is cut: when a level is trained but not written, or just after it was written."""


class Killed(BaseException):
    """No error that anybody catches."""


def config(out: str, seed: int):
    return quick_irp(
        out, seed=seed, levels=LEVELS, steps_per_level=1, samples_per_class=1,
        data=DataConfig(train_limit=100),
    )  # fmt: skip


@cache
def unbroken(seed: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return survival_of(run_irp(config(folder, seed)))


def survival_of(folder: Path) -> str:
    run = store.read_run(folder)
    return " ".join(store.sha256_of_tensor(run.survival[name]) for name in sorted(run.survival))


class Corpora(RuleBasedStateMachine):
    """Two runs of a corpus, each known by the levels that have been written."""

    def __init__(self) -> None:
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory()
        self.out = self.temporary.name
        self.written = dict.fromkeys(SEEDS, 0)
        self.trained: Counter = Counter()
        """(seed, level) -> how often it was trained to its end and not cut before it was written"""

    @rule(seed=st.sampled_from(SEEDS), more=st.integers(0, LEVELS), event=st.sampled_from(EVENTS))
    def go_on_and_be_cut(self, seed: int, more: int, event: str) -> None:
        """Cut while level `written + more` is trained, or once it is written."""
        last = self.written[seed] + more
        cut = False

        def on_epoch(level: int, epoch: object) -> None:
            assert level >= self.written[seed], "a finished level is done again"
            if (event, level) == ("epoch", last):
                raise Killed
            self.trained[seed, level] += 1

        def on_level(entry: dict) -> None:
            if (event, entry["level"]) == ("level", last):
                raise Killed

        try:
            run_irp(config(self.out, seed), on_epoch, on_level)
        except Killed:
            cut = True
        assert cut == (last <= LEVELS)
        self.written[seed] = min(last + (event == "level"), LEVELS + 1)
        if not cut:
            assert store.is_finished(run_folder(config(self.out, seed)))

    @rule(seed=st.sampled_from(SEEDS), level=st.integers(0, LEVELS))
    def leave_what_a_kill_leaves(self, seed: int, level: int) -> None:
        """A file that was half written, under its temporary name."""
        folder = run_folder(config(self.out, seed)) / "levels" / f"{level:02d}"
        if self.written[seed] <= LEVELS:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".level.safetensors.tmp").write_bytes(b"half")

    @invariant()
    def nothing_is_trained_twice(self) -> None:
        assert set(self.trained.values()) <= {1}
        for seed in SEEDS:
            levels = [level for who, level in self.trained if who == seed]
            assert sorted(levels) == list(range(self.written[seed]))

    @invariant()
    def only_whole_runs_count_as_finished(self) -> None:
        for seed, levels in self.written.items():
            finished = store.is_finished(run_folder(config(self.out, seed)))
            assert not finished or levels == LEVELS + 1

    def teardown(self) -> None:
        for seed in SEEDS:
            folder = run_irp(config(self.out, seed))
            assert survival_of(folder) == unbroken(seed)
            assert not list(folder.rglob("*.tmp"))
            with claimed(folder):
                pass
        self.temporary.cleanup()


TestCorpora = Corpora.TestCase
TestCorpora.settings = settings(max_examples=3, stateful_step_count=6)
