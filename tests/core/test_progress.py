"""Tables on narrow terminals: no head is cut, and no cell."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import pytest
from rich.console import Console

from autosparse.core.progress import Progress, print_table, shortened

ROW = {
    "layer": "stages.0.0.shortcut.conv.conv.weight", "shape": "32x24x1x1", "weights": 768,
    "validation accuracy": "97.7 ± 0.3", "rank correlation": 0.6338, "fingerprint": "8e36cafc" * 2,
}  # fmt: skip


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_no_word_is_cut(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    print_table([ROW])
    said = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "…" not in said
    for key in ROW:
        for word in key.split():
            assert word in said
    if columns >= 80:
        assert max(map(len, said.splitlines())) <= columns


def test_long_paths_lose_their_middle() -> None:
    assert shortened("/a/long/path/to/a/corpus", 11) == "/a/lo…orpus"
    assert shortened("short", 11) == "short"


def printed(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
    **options: Any,
) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    print_table([{"run": "1f8a9d72caf5", "model": "test_efficientnet", "seconds": 1.5}], **options)
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()


def test_a_narrow_terminal_goes_without_spare_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 + 17 + 7 letters, and 3 a column and 1: 46 columns; without the seconds 36."""
    wide = printed(capsys, monkeypatch, 46, spare=["seconds"])
    assert "seconds" in wide[1] and len(wide) == 5
    narrow = printed(capsys, monkeypatch, 45, spare=["seconds"])
    assert narrow[-1] == "without seconds, for which a terminal of 45 is too narrow"
    assert "test_efficientnet" in narrow[3] and len(narrow[3]) == 36


def test_headings_are_folded_before_cells(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """17 + 5 letters, 3 a column and 1 are 29 columns; the whole heading would take 5 more."""
    monkeypatch.setenv("COLUMNS", "29")
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    print_table([{"model": "test_efficientnet", "acc. dense": "9.5"}])
    said = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "test_efficientnet" in said
    assert max(map(len, said.splitlines())) == 29


def test_redirected_output_is_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No terminal: no column is left out, no cell folded, no path shortened, whatever COLUMNS."""
    monkeypatch.setenv("COLUMNS", "40")
    path = "/folder" * 30
    print_table([{"run": "1f8a9d72caf5", "error": path}], f"1 run in {path}", spare=["run"])
    title, *table = capsys.readouterr().out.splitlines()
    assert title == f"1 run in {path}"
    assert len(table) == 5
    assert "run" in table[1] and path in table[3] and "1f8a9d72caf5" in table[3]


def test_only_words_of_a_title_that_are_too_long_are_shortened(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = printed(capsys, monkeypatch, 50, title=f"2 runs in {'/folder' * 10}")
    said = " ".join(" ".join(lines[:-5]).split())
    assert said.startswith("2 runs in /folder") and "…" in said
    plain = printed(capsys, monkeypatch, 50, title="per cent; " * 8)
    assert "…" not in " ".join(plain)


@pytest.mark.parametrize("columns", [80, 120])
def test_the_figures_of_a_bar_are_whole(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done, of how much, how fast, and how long, however long the text before them."""
    monkeypatch.setenv("COLUMNS", str(columns))
    console = Console(record=True, width=columns, file=io.StringIO())
    with Progress() as progress:
        bar = progress.bar(f"growing corpus: 2/6 runs ({'test_efficientnet' * 9})", 42, "levels")
        bar.started -= 100
        bar.set(36)
        console.print(progress._rich.get_renderable())
    said = console.export_text()
    assert "36/42 levels" in said and "0.36 levels/s" in said and " left" in said
    assert "growing corpus:" in said


def test_a_line_of_a_log_says_no_more_than_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        bar = progress.bar("verifying", 3, "MB")
        bar.start_at(3)
        bar.set(3)
        again = progress.bar("packing", 4, "images")
        again.started -= 2
        again.set(4)
    assert capsys.readouterr().err.splitlines() == [
        "verifying: 3/3 MB", "packing: 4/4 images, 2 images/s, 0 s left",
    ]  # fmt: skip
