"""What may be done after a verb: one line at its end."""

from __future__ import annotations

import shlex
from typing import Any

NEXT = {
    "quickstart": "autosparse --help, or docs/tutorials/own_model.md for a model of your own",
    "irp": "autosparse fit --corpus {out}",
    "fit": "autosparse prune --options.scorer {out} --model.name NAME",
    "prune": "autosparse train --tickets {out}",
    "compare": "autosparse report {out}",
    "train": "autosparse export --ticket {out}/NAME, with the folder of one of these trainings",
}
"""Verb -> the command that most people want next; {out} is where the verb has written to."""


def next_step(verb: str, config: Any) -> str | None:
    """Return the line for a verb that has finished, or None where nothing follows."""
    if verb not in NEXT or getattr(config, "dry_run", False):
        return None
    return f"next: {NEXT[verb].format(out=shlex.quote(str(config.out)))}"
