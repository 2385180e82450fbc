"""`autosparse inspect`: cards are read by people, on any terminal."""

from __future__ import annotations

import sys

import pytest
import yaml

from autosparse.cli.verbs.inspection import _print_card

CARD = {
    "criterion": "snip",
    "data": {"name": "digits", "root": None, "cache": "/a/folder" * 20},
    "inputs": [f"feature_{number}" for number in range(30)],
    "rows": [{"epoch": 1, "loss": 0.5}],
    "options": {},
    "note": "two\nlines",
}


@pytest.mark.parametrize("columns", [80, 120])
def test_no_line_of_a_card_is_wider_than_the_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    _print_card(CARD)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= columns
    assert "  criterion: snip\n  data:\n" in said and "    name: digits\n" in said
    assert "…" in said and "feature_29]" in said


def test_a_redirected_card_is_yaml_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    _print_card(CARD)
    assert yaml.safe_load(capsys.readouterr().out) == CARD
