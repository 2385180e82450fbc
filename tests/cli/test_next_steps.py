"""Verbs that make something end with what to do next."""

from __future__ import annotations

import dataclasses
import shlex
import string
from pathlib import Path

import pytest

from autosparse.cli import main
from autosparse.cli.next_steps import NEXT, next_step
from autosparse.criteria.config import PruneConfig
from autosparse.study.config import StudyConfig

ROOT = Path(main.__file__).parents[2]


def test_every_step_is_a_verb_that_there_is() -> None:
    for line in NEXT.values():
        words = shlex.split(line)
        if "autosparse" in words[:-1]:
            verb = words[words.index("autosparse") + 1].rstrip(",.")
            assert verb in (*main.VERBS, "--help") or "howto" in line
        else:
            assert "docs/" in line


def test_every_command_ends_with_one() -> None:
    commands = {
        f"{name} {action}".strip() for name, verb in main.VERBS.items()
        for action in verb.actions or [""]
    }  # fmt: skip
    jobs = {path.name for path in (ROOT / "ray_jobs").glob("*.py")}
    assert set(NEXT) == commands | jobs


@pytest.mark.parametrize("command", NEXT)
def test_what_it_names_is_known_then(command: str) -> None:
    """Settings have `out` where it is named, and paths are those of the command."""
    fields = {name for _, name, _, _ in string.Formatter().parse(NEXT[command]) if name}
    if command in main.VERBS or " " in command:
        verb = main.VERBS[command.split()[0]]
        verb = verb.actions[command.split()[1]] if " " in command else verb
        kind = main.settings_class(verb.settings) if verb.settings else None
        known = {*verb.paths, *(each.name for each in (dataclasses.fields(kind) if kind else ()))}
        assert fields <= known


def test_paths_that_came_before_the_settings_are_named() -> None:
    assert next_step("shards pack", None, {"source": "a", "folder": "b c"}) == (
        "next: autosparse prune --data.name shards --data.root 'b c'"
    )
    assert next_step("figures", None, {"path": ["a", "b"]}) == (
        "next: autosparse report a, one page of all of them"
    )


def test_names_with_blanks_are_quoted() -> None:
    assert next_step("prune", PruneConfig(out="a b")) == "next: autosparse train --tickets 'a b'"
    assert next_step("unheard of") is None


def test_nothing_follows_a_dry_run() -> None:
    assert next_step("compare", StudyConfig(dry_run=True)) is None
    assert next_step("compare", StudyConfig()) == "next: autosparse registry add comparison"


def test_prune_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["prune", "--model.name", "test_resnet", "--criterion", "magnitude"]
    assert main.guarded(main._main, given) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "next: autosparse train --tickets ticket.safetensors"
    )
