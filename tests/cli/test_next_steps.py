"""Verbs that make something end with what to do next."""

from __future__ import annotations

import dataclasses
import shlex
import string
from pathlib import Path

import pytest

from autosparse.cli import main
from autosparse.cli.next_steps import NEXT, next_step
from autosparse.core.files import write_tensors
from autosparse.criteria.config import PruneConfig
from autosparse.integrations import RUN_FILE
from autosparse.study.config import StudyConfig

ROOT = Path(main.__file__).parents[2]


def lines_of(step: str | dict[str, str]) -> list[str]:
    """Return the lines that may be said after a command."""
    return [step] if isinstance(step, str) else list(step.values())


def test_every_step_is_a_verb_that_there_is() -> None:
    for line in (each for step in NEXT.values() for each in lines_of(step)):
        words = shlex.split(line)
        if "autosparse" in words[:-1]:
            verb = words[words.index("autosparse") + 1].rstrip(",.")
            assert verb in (*main.VERBS, "--help") or "howto" in line
        else:
            assert "docs/" in line or "page" in line


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
    said = " ".join(lines_of(NEXT[command]))
    fields = {name for _, name, _, _ in string.Formatter().parse(said) if name}
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
    assert next_step("corpus merge", None, {"source": ["a", "b"], "into": "c"}) == (
        "next: autosparse corpus verify c"
    )


@pytest.mark.parametrize(
    ("command", "files", "said"),
    [
        ("report", ["sweep.json", RUN_FILE], "autosparse registry add IT registers the best"),
        ("report", ["comparison.json"], "open the page in a browser"),
        ("report", [RUN_FILE, "run/finished.json"], "autosparse fit --corpus IT"),
        ("figures", ["comparison.json"], "autosparse report IT, one page"),
        ("figures", ["study/comparison.json"], "autosparse report IT/study"),
        ("inspect", ["run/finished.json"], "autosparse fit --corpus IT"),
        ("inspect", ["finished.json"], "autosparse fit --corpus FOLDER"),
        ("inspect", ["run/finished.json", "study/cell"], "autosparse fit --corpus IT"),
        ("report", ["run/finished.json", "study/cell"], "autosparse fit --corpus IT"),
    ],
)
def test_what_is_next_hangs_on_what_a_folder_holds(
    command: str, files: list[str], said: str, tmp_path: Path
) -> None:
    """What was not tracked cannot be registered, and a corpus is no sweep."""
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    line = next_step(command, None, {"path": [str(tmp_path), "another"]})
    assert line is not None and said.replace("IT", str(tmp_path)) in line
    assert ("registry" in line) == (RUN_FILE in files and "sweep.json" in files)


def test_what_nothing_is_known_of_ends_without_a_line(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text("{}")
    assert next_step("inspect", None, {"path": str(tmp_path)}) is None


@pytest.mark.parametrize(
    ("file", "kind", "said"),
    [
        ("a.safetensors", "ticket", "train --tickets"),
        ("trained.safetensors", "ticket", "export --ticket"),
        ("a.safetensors", "autos", "prune --options.scorer"),
    ],
)
def test_what_is_next_hangs_on_what_a_file_is(
    file: str, kind: str, said: str, tmp_path: Path
) -> None:
    write_tensors(tmp_path / file, {}, {"kind": kind})
    path = str(tmp_path / file)
    assert f"autosparse {said} {path}" in (next_step("inspect", None, {"path": [path]}) or "")


def test_names_with_blanks_are_quoted() -> None:
    assert next_step("prune", PruneConfig(out="a b")) == "next: autosparse train --tickets 'a b'"
    assert next_step("unheard of") is None


def test_nothing_follows_a_dry_run() -> None:
    assert next_step("compare", StudyConfig(dry_run=True)) is None
    assert next_step("compare", StudyConfig()) == "next: autosparse registry add comparison"
    untracked = next_step("compare", StudyConfig(tracking=False))
    assert untracked == "next: open the page in a browser"


def test_prune_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["prune", "--model.name", "test_resnet", "--criterion", "magnitude"]
    assert main.guarded(main._main, given) == 0
    said = capsys.readouterr()
    assert "next:" not in said.out  # Scripts read results there.
    assert said.err.splitlines()[-1] == "next: autosparse train --tickets ticket.safetensors"
