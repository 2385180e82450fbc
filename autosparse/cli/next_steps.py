"""What may be done after a verb: one line at its end, on stderr, so that stdout holds results."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from typing import Any

from autosparse.core.files import place, read_card
from autosparse.integrations import RUN_FILE
from autosparse.study.config import StudyConfig, SweepConfig

TRACKED, UNTRACKED = "tracked study", "study"
OPEN = "open the page in a browser"
NEXT: dict[str, str | dict[str, str]] = {
    "quickstart": "autosparse --help, or docs/tutorials/own_model.md for a model of your own",
    "irp": "autosparse fit --corpus {out}",
    "fit": "autosparse prune --options.scorer {out} --model.name NAME",
    "prune": "autosparse train --tickets {out}",
    "compare": {TRACKED: "autosparse registry add {out}", UNTRACKED: OPEN},
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
    "figures": {
        "autos": "autosparse registry add {path}",
        "quickstart": "autosparse report {path}/study, one page of all of its figures",
        "": "autosparse report {path}, one page of all of them",
    },
    "report": {
        TRACKED: OPEN + "; autosparse registry add {path} registers the best",
        UNTRACKED: OPEN,
        "corpus": OPEN + "; autosparse fit --corpus {path} fits an AutoS on it",
    },
    "registry ls": "autosparse registry promote NAME --version N, or registry add PATH",
    "registry add": "autosparse registry ls",
    "registry promote": "autosparse registry ls",
    "inspect": {
        "ticket": "autosparse train --tickets {path}",
        "trained ticket": "autosparse export --ticket {path}",
        "autos": "autosparse prune --options.scorer {path} --model.name NAME",
        "irp": "autosparse fit --corpus FOLDER, with the folder that holds this run",
        "corpus": "autosparse fit --corpus {path}",
    },
    "grow_corpus.py": "autosparse fit --corpus {out}",
    "sweep_sparsity.py": {TRACKED: "autosparse registry add {out}", UNTRACKED: OPEN},
}
"""Command -> what most people want next; in braces a setting, or a path that came before them.

Where it depends on what the path holds, what may be there -> what is next; "" is anything else.
"""


def say_next(
    command: str, config: Any = None, paths: Mapping[str, str | list[str]] | None = None
) -> None:
    """Print the line to stderr, after all that was printed to stdout."""
    if line := next_step(command, config, paths):
        sys.stdout.flush()
        print(line, file=sys.stderr, flush=True)


def next_step(
    command: str, config: Any = None, paths: Mapping[str, str | list[str]] | None = None
) -> str | None:
    """Return the line for a command that has finished, or None where nothing follows."""
    if command not in NEXT or getattr(config, "dry_run", False):
        return None
    known = {"out": str(getattr(config, "out", ""))}
    for name, path in (paths or {}).items():
        known[name] = path if isinstance(path, str) else path[0]
    step = NEXT[command]
    if not isinstance(step, str):
        held = _held(known["path"]) if "path" in known else _study(config.tracking)
        step = step.get(held, step.get(""))
    if step is None:
        return None
    return f"next: {step.format(**{k: shlex.quote(v) for k, v in known.items()})}"


def _study(tracked: bool) -> str:
    return TRACKED if tracked else UNTRACKED


def _held(name: str) -> str:
    """Return what a file or folder that a verb has just read holds."""
    from autosparse.corpus.store import is_finished
    from autosparse.study.trainings import TRAINED

    path = place(name)
    if path.is_file():
        return "trained ticket" if path.name == TRAINED else read_card(path)["kind"]
    if is_finished(path):
        return "irp"
    if any((path / each).is_file() for each in (StudyConfig.report, SweepConfig.report)):
        return _study((path / RUN_FILE).is_file())
    return "quickstart" if (path / "study" / StudyConfig.report).is_file() else "corpus"
