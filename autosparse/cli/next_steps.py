"""What may be done after a verb: one line at its end."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

NEXT = {
    "quickstart": "autosparse --help, or docs/tutorials/own_model.md for a model of your own",
    "irp": "autosparse fit --corpus {out}",
    "fit": "autosparse prune --options.scorer {out} --model.name NAME",
    "prune": "autosparse train --tickets {out}",
    "compare": "autosparse registry add {out}",
    "train": "autosparse export --ticket {out}/NAME, with the folder of one of these trainings",
    "export": "docs/howto/export.md says how to load it without autosparse",
    "measure": "autosparse export --format slim writes the smaller network of a trained ticket",
    "corpus ls": "autosparse inspect {path}/RUN",
    "corpus verify": "autosparse fit --corpus {path}",
    "corpus index": "autosparse corpus ls {path}",
    "corpus merge": "autosparse corpus verify {into}",
    "corpus report": "autosparse fit --corpus {path}",
    "shards pack": "autosparse prune --data.name shards --data.root {folder}",
    "shards verify": "autosparse prune --data.name shards --data.root {path}",
    "shards index": "autosparse shards verify {path}",
    "figures": "autosparse report {path}, one page of all of them",
    "report": "open the page in a browser; autosparse registry add {path} registers the best",
    "registry ls": "autosparse registry promote NAME --version N",
    "registry add": "autosparse registry ls",
    "registry promote": "autosparse registry ls",
    "inspect": "autosparse --help lists what may be done with it",
    "grow_corpus.py": "autosparse fit --corpus {out}",
    "sweep_sparsity.py": "autosparse registry add {out}",
}
"""Command -> what most people want next; in braces a setting, or a path that came before them."""


def next_step(
    command: str, config: Any = None, paths: Mapping[str, str | list[str]] | None = None
) -> str | None:
    """Return the line for a command that has finished, or None where nothing follows."""
    if command not in NEXT or getattr(config, "dry_run", False):
        return None
    known = {"out": str(getattr(config, "out", ""))}
    for name, path in (paths or {}).items():
        known[name] = path if isinstance(path, str) else path[0]
    return f"next: {NEXT[command].format(**{k: shlex.quote(v) for k, v in known.items()})}"
