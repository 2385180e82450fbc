"""Look after a corpus: check every byte, and copy runs from one corpus into another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autosparse.core.errors import RunFailed, UsageError, UserError
from autosparse.core.files import (
    place,
    read_card,
    read_json,
    read_tensors,
    sha256_of_file,
    write_bytes,
)
from autosparse.core.locks import claimed
from autosparse.corpus import store
from autosparse.corpus.store import FINISHED, NO_RUNS, RUN, Corpus

CARD = "card.json"


@dataclass(frozen=True)
class Problem:
    """Something in a corpus that is not as it was written."""

    run_id: str
    file: str
    what: str

    def __str__(self) -> str:
        return f"run {self.run_id}: {self.file}: {self.what}"


def verify(path: str | Path) -> Iterator[tuple[str, list[Problem]]]:
    """Yield every run's id, finished or not, with its problems; [] if it has none."""
    folder = Corpus(path).path
    for child in sorted(folder.iterdir()):
        if child.name not in NO_RUNS and child.is_dir():
            yield child.name, _problems(child)


def _problems(folder: Path) -> list[Problem]:
    return [Problem(folder.name, file, what) for file, what in _differences(folder)]


def _differences(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield files of a run that are not as they were written, and what is wrong."""
    if store.is_finished(folder):
        yield from _of_finished(folder)
        return
    files = [(path, read_card) for path in sorted(folder.glob("levels/*/level.safetensors"))]
    if (folder / CARD).is_file():  # Not there where a run has failed before it began.
        files.append((folder / CARD, read_json))
    for path, read in files:
        try:
            read(path)
        except UserError as error:
            yield path.name, str(error)


def _of_finished(folder: Path) -> Iterator[tuple[str, str]]:
    file = FINISHED
    try:
        marker = store.marker_of(folder)
        file = RUN
        tensors, card = read_tensors(folder / RUN)
    except UsageError as error:
        yield file, str(error)
        return
    digests_now = {key: store.sha256_of_tensor(tensor) for key, tensor in tensors.items()}
    if sha256_of_file(folder / RUN) == marker["sha256"]:
        yield from _of_marker(marker, digests_now, store.row_of(card))
        yield from _of_first_card(folder / CARD, card)
        return
    digests = marker.get("tensors", {})
    wrong = [key for key, digest in digests.items() if digests_now.get(key) != digest]
    for key in wrong:
        group, _, parameter = key.partition("/")
        yield RUN, f"parameter {parameter} ({group}) is not what was written"
    if not wrong:
        what = f"its header (or the SHA-256 in {FINISHED})" if digests else "it"
        yield RUN, f"{what} is not what was written (the SHA-256 differs)"


def _of_first_card(path: Path, card: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Compare the card that the run began with, if it is there, with that of the whole run."""
    if not path.is_file():
        return
    try:
        first = read_json(path)
    except UsageError as error:
        yield CARD, str(error)
        return
    if not isinstance(first, dict):
        yield CARD, "is no card"
        return
    for key, value in first.items():
        # A later version that took the run up may know more settings.
        if key not in ("config", "versions") and card.get(key) != value:
            yield CARD, f"its entry {key!r} is not that of {RUN}"


def _of_marker(
    marker: dict[str, Any], digests: dict[str, str], row: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """Compare the marker's other entries with the run, whose file is whole."""
    expected: dict[str, Any] = {"sha256": marker["sha256"], "tensors": digests}
    # A later version's row may have more columns.
    expected["row"] = {key: row.get(key) for key in marker.get("row", {})}
    for key, value in marker.items():
        if expected.get(key) != value:
            yield FINISHED, f"its entry {key!r} is not what was written"


def merge(sources: Iterable[str | Path], into: str | Path) -> tuple[list[str], list[str]]:
    """Copy finished runs into another corpus; return the ids of (copied, already there).

    Each is checked on the way, and its commit marker comes last. Raises RunFailed after all that
    can be copied is, if a run is damaged, is there with another content, or is being worked on.
    """
    target = place(into)
    copied, there, problems = [], [], []
    for folder in [folder for source in sources for folder in Corpus(source).folders()]:
        goal = target / folder.name
        wrong = _problems(folder)
        if wrong:
            problems += [str(problem) for problem in wrong]
            continue
        try:
            (copied if _copied(folder, goal) else there).append(folder.name)
        except UsageError as error:
            problems.append(str(error))
            continue
        if folder.name in there and not _same(folder, goal):
            problems.append(f"{folder} and {goal} differ; kept {goal}")
    if copied:
        Corpus(target).write_index()
    if problems:
        raise RunFailed(f"{len(copied)} runs copied; " + "; ".join(problems))
    return copied, there


def _copied(folder: Path, goal: Path) -> bool:
    """Copy a finished run; False if it is there. UsageError if another process works on it."""
    if store.is_finished(goal):
        return False
    with claimed(goal, finished=lambda: store.is_finished(goal)) as claim:
        if claim is None or store.is_finished(goal):
            return False
        for name in (RUN, CARD, FINISHED):
            if (folder / name).is_file():
                claim.check()
                write_bytes(goal / name, (folder / name).read_bytes())
    return True


def _same(one: Path, other: Path) -> bool:
    """Whether two runs hold the same tensors; the seconds on their cards may differ."""
    try:
        first, second = store.marker_of(one), store.marker_of(other)
    except UsageError:
        return False
    if first["sha256"] == second["sha256"]:
        return True
    one_has, other_has = first.get("tensors", {}), second.get("tensors", {})
    common = one_has.keys() & other_has.keys()
    return bool(common) and all(one_has[key] == other_has[key] for key in common)
