"""Which checkpoints count, which are passed over and named, and which go."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from autosparse.integrations.deepspeed_checkpoints import MARKER, begin, commit, newest, tag_of
from autosparse.training.steppers import Ranks
from tests.conftest import flip

ALONE = Ranks()


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """One rank, which agrees with itself."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def write(parent: Path, step: int, *, whole: bool = True) -> Path:
    """Write a checkpoint of two files, to its end or not."""
    begin(parent, step, ALONE)
    folder = parent / tag_of(step)
    (folder / "zero").mkdir(parents=True)
    (folder / "model.pt").write_bytes(b"weights of step %d" % step)
    (folder / "zero" / "optimizer.pt").write_bytes(b"moments of step %d" % step)
    if whole:
        commit(parent, step, ALONE)
    return folder


def steps(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


def test_a_marker_holds_every_file(tmp_path: Path) -> None:
    folder = write(tmp_path, 12)
    content = json.loads((folder / MARKER).read_text())
    assert (content["step"], content["world_size"]) == (12, 1)
    assert sorted(content["files"]) == ["model.pt", "zero/optimizer.pt"]
    assert content["files"]["model.pt"]["bytes"] == len(b"weights of step 12")


def test_the_newest_whole_one_is_used_and_two_stay(tmp_path: Path, capsys) -> None:
    for step in (8, 9, 10, 100):
        write(tmp_path, step)
    found = newest(tmp_path, ALONE)
    assert found is not None
    assert (found.step, found.world_size, found.tag) == (100, 1, "step00000100")
    assert steps(tmp_path) == ["step00000010", "step00000100"]
    assert capsys.readouterr().err == ""
    assert newest(tmp_path / "nowhere", ALONE) is None


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda folder: (folder / MARKER).unlink(), "it was not written to its end"),
    "flipped": (lambda folder: flip(folder / "model.pt", 3), "model.pt is not what was written"),
    "short": (
        lambda folder: (folder / "model.pt").write_bytes(b"w"),
        "model.pt is not what was written",
    ),
    "missing": (
        lambda folder: (folder / "zero" / "optimizer.pt").unlink(),
        "zero/optimizer.pt is missing",
    ),
    "no JSON": (lambda folder: (folder / MARKER).write_text("{"), f"{MARKER} is damaged"),
    "no step": (lambda folder: (folder / MARKER).write_text("{}"), f"{MARKER} is damaged"),
    "a list": (lambda folder: (folder / MARKER).write_text("[]"), f"{MARKER} is damaged"),
    "another step": (
        lambda folder: (folder / MARKER).write_text(
            (folder / MARKER).read_text().replace('"step": 8', '"step": 9')
        ),
        f"{MARKER} is damaged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_used(
    tmp_path: Path, capsys, damage: str
) -> None:
    for step in (4, 8):
        write(tmp_path, step)
    folder = tmp_path / tag_of(8)
    spoil, problem = DAMAGES[damage]
    spoil(folder)
    found = newest(tmp_path, ALONE)
    assert found is not None
    assert found.step == 4
    assert capsys.readouterr().err == f"warning: checkpoint {folder} is passed over: {problem}\n"


def test_where_none_is_whole_there_is_none(tmp_path: Path, capsys) -> None:
    for step in (4, 8):
        write(tmp_path, step, whole=False)
    assert newest(tmp_path, ALONE) is None
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_what_was_passed_over_goes_and_no_whole_one_for_it(tmp_path: Path) -> None:
    """After a start from step 8, a rest of step 16 is not taken for one of the newest two."""
    write(tmp_path, 4)
    write(tmp_path, 8)
    write(tmp_path, 16, whole=False)
    write(tmp_path, 12)
    assert steps(tmp_path) == ["step00000008", "step00000012"]


def test_a_rest_of_the_same_step_is_not_part_of_the_new_one(tmp_path: Path) -> None:
    folder = write(tmp_path, 4, whole=False)
    (folder / "of another rank.pt").write_bytes(b"old")
    write(tmp_path, 4)
    assert not (folder / "of another rank.pt").exists()
    assert sorted(json.loads((folder / MARKER).read_text())["files"]) == [
        "model.pt",
        "zero/optimizer.pt",
    ]
