"""Progress bars with rates and time left, and tables, in the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich import progress as rich_progress
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

LOG_SECONDS = 10.0
"""Seconds between two lines where the output is no terminal."""
UNLIMITED = 10_000
"""Columns where the output is no terminal: every column is printed there, and no cell folded."""
FIGURES_WIDTH = 61
"""Columns that a bar and its figures take beside what they are of."""


class TimeLeft(rich_progress.TimeRemainingColumn):
    """The time that is left, and the word for it."""

    def render(self, task: rich_progress.Task) -> Text:
        """Return it as text."""
        return super().render(task).append(" left")


class Progress:
    """Bars on a terminal; a line every `LOG_SECONDS` where the output is a file."""

    def __init__(self, enabled: bool = True) -> None:
        self.console = Console(stderr=True)
        self.live = enabled and self.console.is_terminal
        self.lines = enabled and not self.live
        self.room = max(15, self.console.width - FIGURES_WIDTH)
        whole = Column(no_wrap=True)
        self._rich = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}", table_column=whole),
            rich_progress.BarColumn(10),
            rich_progress.TextColumn(
                "{task.completed:g}/{task.total:g} {task.fields[unit]}", table_column=whole
            ),
            rich_progress.TextColumn("{task.fields[rate]}", table_column=whole),
            rich_progress.TimeElapsedColumn(),
            TimeLeft(elapsed_when_finished=False, table_column=whole),
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
        self.task = owner._rich.add_task(
            self._fitting(description), total=total, unit=unit, rate=""
        )

    def describe(self, description: str) -> None:
        """Change the text."""
        self.description = description
        self.owner._rich.update(self.task, description=self._fitting(description))

    def _fitting(self, description: str) -> str:
        """Return the beginning of a text that is too long for the figures to stay whole."""
        room = self.owner.room
        return description if len(description) <= room else f"{description[: room - 1]}…"

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
            parts = [f"{self.description}: {done:g}/{self.total:g} {self.unit}"]
            if rate:
                parts += [rate, f"{(self.total - done) / here * seconds:.0f} s left"]
            print(", ".join(parts), file=sys.stderr, flush=True)

    def _line_is_due(self) -> bool:
        now = time.monotonic()
        due = now - self.last_line >= LOG_SECONDS or self.done >= self.total
        if due:
            self.last_line = now
        return due


def print_table(rows: Sequence[dict[str, Any]], title: str = "", spare: Sequence[str] = ()) -> None:
    """Print rows of the same keys as a table; numbers to the right.

    Nothing in the table is cut: what is too long for the terminal is folded between words of a
    heading and anywhere in a cell. If it is still too wide, lines go beyond the edge. A long path
    in the title loses its middle. Where the output is no terminal, all of it is printed as it is.

    Args:
        rows: the lines.
        title: what is written above.
        spare: columns that a terminal too narrow for all goes without, the first first; a line
            below names those that were left out.
    """
    width = terminal_width()
    lines = [{key: as_text(value) for key, value in row.items()} for row in rows]
    widths = _widths(lines)
    left_out = _left_out(widths, width, spare)
    if title:
        title = " ".join(shortened(word, width) for word in title.split(" "))
        Console(width=width, highlight=False).print(Text(title, style="italic"))
    tight = _total(widths) <= width < _total({k: max(w, len(k)) for k, w in widths.items()})
    table, least = Table(), 1
    for key, value in (rows[0] if rows else {}).items():
        if key in left_out:
            continue
        right = isinstance(value, int | float) or str(value)[:1].isdigit()
        least += _longest_word(key) + 3
        table.add_column(
            key,
            justify="right" if right else "left",
            min_width=_longest_word(key),
            width=widths[key] if tight else None,  # Only headings are folded.
            overflow="fold",
        )
    for line in lines:
        table.add_row(*(value for key, value in line.items() if key not in left_out))
    Console(width=max(width, least), soft_wrap=False).print(table, crop=False)
    if left_out:
        print(f"without {', '.join(left_out)}, for which a terminal of {width} is too narrow")


def terminal_width() -> int:
    """Return the columns of the terminal that stdout is, or `UNLIMITED` where it is none."""
    return Console().width if sys.stdout.isatty() else UNLIMITED


def _widths(lines: Sequence[dict[str, str]]) -> dict[str, int]:
    """Return the width of every column that folds headings between words, and no cell."""
    return {
        key: max(_longest_word(key), *(len(line.get(key, "")) for line in lines))
        for key in (lines[0] if lines else {})
    }


def _total(widths: dict[str, int]) -> int:
    return 1 + sum(width + 3 for width in widths.values())


def _left_out(widths: dict[str, int], width: int, spare: Sequence[str]) -> list[str]:
    """Take columns out of `widths` until no cell of the rest is folded; return their names."""
    dropped: list[str] = []
    for key in spare:
        if _total(widths) <= width:
            break
        if widths.pop(key, None) is not None:
            dropped.append(key)
    return dropped


def _longest_word(text: str) -> int:
    return max((len(word) for word in text.split()), default=1)


def shortened(text: str, width: int) -> str:
    """Return a text of at most `width` characters: a longer one loses its middle."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def as_text(value: Any) -> str:
    """Return a value of a table as text, numbers short."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
