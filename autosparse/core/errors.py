"""Errors that a user can act on: one line, and an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake or a failure that one line explains; no traceback is shown for it."""

    exit_code = 1
    everywhere = False
    """Whether all ranks of a training raise it alike, so that they may go on with other work."""

    def on_all_ranks(self) -> UserError:
        """Say that all ranks raise it."""
        self.everywhere = True
        return self


class UsageError(UserError):
    """A wrong name, key, value or file (exit code 2)."""

    exit_code = 2


class RunFailed(UserError):
    """A valid request that failed while it ran: NaN loss, a full disk (exit code 1)."""


class Stopped(UserError):
    """A run that was told to stop, and has saved its work (exit code 75: try again later)."""

    exit_code = 75


def nearest(name: object, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name closest to `name`, or ""."""
    spelt = {each.lower(): each for each in known}
    close = difflib.get_close_matches(str(name).lower(), list(spelt), n=1, cutoff=0.5)
    return f" Did you mean {spelt[close[0]]!r}?" if close else ""


def unknown(kind: str, name: object, known: Iterable[str]) -> UsageError:
    """Build the error for an unknown name, with the nearest known one."""
    known = sorted(known)
    listing = f" Known: {', '.join(known) or 'none'}." if len(known) <= 20 else ""
    return UsageError(f"unknown {kind} {name!r}.{nearest(name, known)}{listing}")
