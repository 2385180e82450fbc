"""Finds lines of prose over 100 characters, and tables of over six columns, in the Markdown files.

Of lines, those of tables, code, formulas, comments and headings are left alone, and what a link
leads to is not counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LONGEST, MOST_COLUMNS = 100, 6
AS_IT_WAS = ROOT / "docs" / "results" / "log.md"
"""The research log keeps the tables that were made then."""
RULE = re.compile(r"\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)+\|?")
"""The line of dashes below the head of a table."""
TARGET = re.compile(r"\]\([^)]*\)|https?://\S+")


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
    """Return "FILE:LINE" for every line of prose that is too long."""
    name = path.relative_to(ROOT)
    return [
        f"{name}:{number}"
        for number, line in prose(path.read_text(encoding="utf-8"))
        if len(TARGET.sub("", line)) > LONGEST
    ]


def too_wide(path: Path) -> list[str]:
    """Return "FILE:LINE" for every table of more than six columns."""
    name = path.relative_to(ROOT)
    return [
        f"{name}:{number}"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if RULE.fullmatch(line.strip()) and line.strip().strip("|").count("|") >= MOST_COLUMNS
    ]
