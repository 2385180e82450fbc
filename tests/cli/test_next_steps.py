"""Verbs that make something end with what to do next."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from autosparse.cli import main
from autosparse.cli.next_steps import NEXT, next_step
from autosparse.criteria.config import PruneConfig
from autosparse.study.config import StudyConfig


def test_every_step_is_a_verb_that_there_is() -> None:
    assert set(NEXT) <= set(main.VERBS)
    for line in NEXT.values():
        program, verb, *_ = shlex.split(line)
        assert program == "autosparse"
        assert verb.rstrip(",") in (*main.VERBS, "--help")


def test_names_with_blanks_are_quoted() -> None:
    assert next_step("prune", PruneConfig(out="a b")) == "next: autosparse train --tickets 'a b'"
    assert next_step("inspect", ["x"]) is None


def test_nothing_follows_a_dry_run() -> None:
    assert next_step("compare", StudyConfig(dry_run=True)) is None
    assert next_step("compare", StudyConfig()) == "next: autosparse report comparison"


def test_prune_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["prune", "--model.name", "test_resnet", "--criterion", "magnitude"]
    assert main.guarded(main._main, given) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "next: autosparse train --tickets ticket.safetensors"
    )
