"""Tables on narrow terminals: no head is cut, and no cell."""

from __future__ import annotations

import re
import sys

import pytest

from autosparse.core.progress import print_table, shortened

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
