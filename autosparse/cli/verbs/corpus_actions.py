"""`autosparse corpus`: look after a corpus."""

from __future__ import annotations

from autosparse.core.errors import RunFailed
from autosparse.core.files import place
from autosparse.core.progress import Progress, print_table


def ls(path: str) -> None:
    """Print a row for every finished run."""
    from autosparse.corpus.store import SPARE, Corpus, shown

    rows = Corpus(path).table()
    print_table([shown(row) for row in rows], f"{len(rows)} finished runs in {path}", SPARE)


def verify(path: str) -> None:
    """Check every byte of every finished run."""
    from autosparse.corpus import upkeep
    from autosparse.corpus.store import is_finished

    damaged, total, unfinished = 0, 0, 0
    for run_id, problems in upkeep.verify(path):
        total += 1
        unfinished += not is_finished(place(path) / run_id)
        damaged += bool(problems)
        for problem in problems:
            print(problem)
    if damaged:
        raise RunFailed(
            f"{damaged} of {total} runs in {path} are damaged: remove their folders (nothing else "
            "is touched) and grow the corpus again, or merge a good copy"
        )
    rest = f"; {unfinished} unfinished" if unfinished else ""
    print(f"{total - unfinished} finished runs in {path}: every byte is what was written{rest}")


def index(path: str) -> None:
    """Write the index anew."""
    from autosparse.corpus.store import Corpus

    print(f"index of {len(Corpus(path).folders())} runs: {Corpus(path).write_index()}")


def merge(sources: list[str], target: str) -> None:
    """Copy the runs of corpora into another one."""
    from autosparse.corpus import upkeep

    copied, there = upkeep.merge(sources, target)
    print(f"{len(copied)} runs copied to {target}, {len(there)} were there already")


def draw(path: str) -> None:
    """Draw what is in a corpus."""
    from autosparse.corpus.store import Corpus
    from autosparse.report.corpus import write_report

    with Progress() as progress:
        bar = progress.bar("reading gradients at init", len(Corpus(path).folders()), "runs")
        figures = write_report(path, on_run=bar.advance)
    for figure in figures:
        print(figure)
