"""Logs and warnings on stderr, one line each.

Modules log by `logging.getLogger(__name__)`. The command line shows that by calling `to_stderr`.
Programs that import autosparse configure the logger `autosparse` like any other.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
_standard = warnings.formatwarning


class _Stderr(logging.Handler):
    """Writes `warning: …` to the current `sys.stderr`: progress bars replace it while they run."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        line = _one_line(f"{record.levelname.lower()}: {record.getMessage()}")
        print(line, file=sys.stderr, flush=True)


def to_stderr() -> None:
    """Show autosparse's logs and warnings as lines without a source location."""
    warnings.formatwarning = _formatted
    logger = logging.getLogger("autosparse")
    if not any(isinstance(each, _Stderr) for each in logger.handlers):
        logger.addHandler(_Stderr())


def _formatted(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    if PACKAGE in Path(filename).parents:
        return _one_line(f"warning: {message}") + "\n"
    return _standard(message, category, filename, lineno, line)


def _one_line(text: str) -> str:
    return " ".join(text.split())
