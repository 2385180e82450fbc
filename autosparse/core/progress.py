"""Progress bars with rates and time left, and tables, in the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich import progress as rich_progress
from rich.console import Console
from rich.table import Table

LOG_SECONDS = 10.0
"""Seconds between two lines where the output is no terminal."""
UNKNOWN_WIDTH = 120
"""Columns of a table that is not printed to a terminal."""


class Progress:
    """Bars on a terminal; a line every `LOG_SECONDS` where the output is a file."""

    def __init__(self, enabled: bool = True) -> None:
        self.console = Console(stderr=True)
        self.live = enabled and self.console.is_terminal
        self.lines = enabled and not self.live
        self._rich = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.TextColumn("{task.completed:g}/{task.total:g} {task.fields[unit]}"),
            rich_progress.TextColumn("{task.fields[rate]}"),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TimeRemainingColumn(elapsed_when_finished=False),
            console=self.console,
            disable=not self.live,
        )

    def __enter__(self) -> Progress:
        self._rich.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._rich.stop()

    def bar(self, description: str, total: float, unit: str) -> Bar:
        """Add a bar that counts up to `total` of `unit`."""
        return Bar(self, description, total, unit)


class Bar:
    """One bar."""

    def __init__(self, owner: Progress, description: str, total: float, unit: str) -> None:
        self.owner, self.description, self.total, self.unit = owner, description, total, unit
        self.done, self.before, self.started = 0.0, 0.0, time.monotonic()
        self.last_line = self.started
        self.task = owner._rich.add_task(description, total=total, unit=unit, rate="")

    def describe(self, description: str) -> None:
        """Change the text."""
        self.description = description
        self.owner._rich.update(self.task, description=description)

    def start_at(self, done: float) -> None:
        """Set how many were done before this run; they do not count for the rate."""
        self.done = self.before = done
        self.owner._rich.update(self.task, completed=done)

    def of(self, total: float) -> None:
        """Set how many there are to do."""
        self.total, self.started = total, time.monotonic()
        self.owner._rich.update(self.task, total=total)

    def advance(self, count: float = 1) -> None:
        """Count `count` more as done."""
        self.set(self.done + count)

    def set(self, done: float) -> None:
        """Set how many are done."""
        self.done = done
        seconds = time.monotonic() - self.started
        here = done - self.before
        rate = f"{here / seconds:.3g} {self.unit}/s" if seconds and here else ""
        self.owner._rich.update(self.task, completed=done, rate=rate)
        if self.owner.lines and self._line_is_due():
            left = (self.total - done) / here * seconds if here else float("nan")
            print(
                f"{self.description}: {done:g}/{self.total:g} {self.unit}, {rate}, "
                f"{left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def _line_is_due(self) -> bool:
        now = time.monotonic()
        due = now - self.last_line >= LOG_SECONDS or self.done >= self.total
        if due:
            self.last_line = now
        return due


def print_table(rows: Sequence[dict[str, Any]], title: str = "") -> None:
    """Print rows of the same keys as a table; numbers to the right.

    Nothing in the table is cut: what is too long for the terminal is folded between words of a
    heading and anywhere in a cell. If it is still too wide, lines go beyond the edge. A long title
    loses its middle.
    """
    width = Console().width if sys.stdout.isatty() else UNKNOWN_WIDTH
    table = Table(title=shortened(title, width) or None, title_justify="left")
    least = 1
    for key, value in (rows[0] if rows else {}).items():
        right = isinstance(value, int | float) or str(value)[:1].isdigit()
        longest = max((len(word) for word in key.split()), default=1)
        least += longest + 3
        table.add_column(
            key, justify="right" if right else "left", min_width=longest, overflow="fold"
        )
    for row in rows:
        table.add_row(*(_shown(value) for value in row.values()))
    Console(width=max(width, least), soft_wrap=False).print(table, crop=False)


def shortened(text: str, width: int) -> str:
    """Return a text of at most `width` characters: a longer one loses its middle."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
