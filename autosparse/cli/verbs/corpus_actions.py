"""`autosparse corpus`: look after a corpus."""

from __future__ import annotations

from collections.abc import Callable

from autosparse.core.errors import RunFailed, UsageError, unknown
from autosparse.core.progress import Progress, print_table


def corpus(arguments: list[str]) -> None:
    """Look after a corpus."""
    action, paths = arguments[0], arguments[1:]
    if action not in CORPUS_ACTIONS:
        raise unknown("corpus action", action, CORPUS_ACTIONS)
    function, least, most = CORPUS_ACTIONS[action]
    if not least <= len(paths) <= most:
        raise UsageError(f"autosparse corpus {action} takes {USAGE_OF[action]}")
    function(*paths)


def _corpus_ls(path: str) -> None:
    from autosparse.corpus.store import Corpus, shown

    rows = Corpus(path).table()
    print_table([shown(row) for row in rows], f"{len(rows)} finished runs in {path}")


def _corpus_verify(path: str) -> None:
    from autosparse.corpus.upkeep import verify

    damaged, total = 0, 0
    for _, problems in verify(path):
        total += 1
        damaged += bool(problems)
        for problem in problems:
            print(problem)
    if damaged:
        raise RunFailed(
            f"{damaged} of {total} runs in {path} are damaged: remove their folders (nothing else "
            "is touched) and grow the corpus again, or merge a good copy"
        )
    print(f"{total} runs in {path}: every byte is what was written")


def _corpus_index(path: str) -> None:
    from autosparse.corpus.store import Corpus

    print(f"index of {len(Corpus(path).folders())} runs: {Corpus(path).write_index()}")


def _corpus_merge(*paths: str) -> None:
    from autosparse.corpus.upkeep import merge

    copied, there = merge(paths[:-1], paths[-1])
    print(f"{len(copied)} runs copied to {paths[-1]}, {len(there)} were there already")


def _corpus_report(path: str) -> None:
    from autosparse.corpus.store import Corpus
    from autosparse.report.corpus import write_report

    with Progress() as progress:
        bar = progress.bar("reading gradients at init", len(Corpus(path).folders()), "runs")
        figures = write_report(path, on_run=bar.advance)
    for figure in figures:
        print(figure)


CORPUS_ACTIONS: dict[str, tuple[Callable[..., None], int, int]] = {
    "ls": (_corpus_ls, 1, 1),
    "verify": (_corpus_verify, 1, 1),
    "index": (_corpus_index, 1, 1),
    "report": (_corpus_report, 1, 1),
    "merge": (_corpus_merge, 2, 1000),
}
"""Action -> function, least and most paths."""
USAGE_OF = {
    **dict.fromkeys(("ls", "verify", "index", "report"), "one corpus folder"),
    "merge": "one or more corpora and the corpus to copy their runs into",
}
