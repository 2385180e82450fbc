"""Finds lines of prose over 100 characters in the Markdown files.

Tables, code, formulas, comments, headings and lines that one link makes long are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LONGEST = 100
LINK = re.compile(r"!?\[[^\]]*\]\([^)]*\)|https?://\S+")


def files() -> list[Path]:
    """Return every Markdown file that people read."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of what is neither table, code, comment nor heading."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            continue
        if not (fenced or line.lstrip().startswith(("|", "<!--", "#", "$$")) or line[:4] == "    "):
            yield number, line


def too_long(path: Path) -> list[str]:
    """Return "FILE:LINE" for every line of prose that is too long without its links."""
    name = path.relative_to(ROOT)
    return [
        f"{name}:{number}"
        for number, line in prose(path.read_text(encoding="utf-8"))
        if len(line) > LONGEST and len(LINK.sub("", line)) > LONGEST - 40
    ]
