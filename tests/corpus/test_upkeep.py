"""Looking after a corpus: every changed byte is found and named, and copies are whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from autosparse.core.errors import RunFailed, UsageError
from autosparse.core.files import read_json, write_json, write_tensors
from autosparse.corpus import store, upkeep
from autosparse.corpus.store import FINISHED, RUN, Corpus
from autosparse.corpus.upkeep import merge, verify
from tests.conftest import flip, holder, tiny_run


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    for name in ("run1", "run2"):
        store.write_run(tmp_path / "corpus" / name, tiny_run(name))
        write_json(tmp_path / "corpus" / name / "card.json", {"run_id": name})
    return tmp_path / "corpus"


def problems(folder: Path) -> list[str]:
    """Return all that is wrong, as it is printed."""
    return [str(problem) for _, found in verify(folder) for problem in found]


def header_of(path: Path) -> dict:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


# verify


def test_all_is_well(folder: Path) -> None:
    assert list(verify(folder)) == [("run1", []), ("run2", [])]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("garbage", "is not valid JSON"),
        ('{"run_id": "run2"}', "its entry 'run_id' is not that of run.safetensors"),
        ("[]", "is no card"),
    ],
)
def test_another_card_than_the_run_began_with_is_named(
    folder: Path, content: str, said: str
) -> None:
    (folder / "run1" / "card.json").write_text(content)
    (found,) = problems(folder)
    assert found.startswith("run run1: card.json: ")
    assert said in found


def test_a_card_may_lack_settings_that_came_later(folder: Path) -> None:
    write_json(folder / "run1" / "card.json", {"run_id": "run1", "config": {}, "versions": {}})
    assert problems(folder) == []


def test_what_else_lies_in_a_corpus_is_no_run(folder: Path) -> None:
    Corpus(folder).write_index()
    (folder / "report").mkdir()
    for name in ("mlflow.json", "notes.txt"):
        (folder / name).write_text("")
    assert list(verify(folder)) == [("run1", []), ("run2", [])]


@pytest.mark.parametrize(
    ("group", "parameter"),
    [("survival", "a.weight"), ("initial", "b.weight"), ("rest", "a.bias")],
)
@pytest.mark.parametrize("place", [0, -1])
def test_a_flipped_bit_names_run_file_and_parameter(
    folder: Path, group: str, parameter: str, place: int
) -> None:
    path = folder / "run2" / RUN
    begin, end = header_of(path)[f"{group}/{parameter}"]["data_offsets"]
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    flip(path, start + (begin if place == 0 else end - 1))
    assert problems(folder) == [
        f"run run2: run.safetensors: parameter {parameter} ({group}) is not what was written"
    ]


def test_the_bytes_of_the_header_count(folder: Path) -> None:
    """A card may be another one and still be JSON; a tensor may get another name."""
    shutil.rmtree(folder / "run2")
    path = folder / "run1" / RUN
    whole = path.read_bytes()
    said = set()
    for position in range(0, 8 + int.from_bytes(whole[:8], "little"), 2):
        flip(path, position)
        found = problems(folder)
        assert found, f"byte {position} was flipped and nobody noticed"
        assert all(line.startswith("run run1: run.safetensors: ") for line in found)
        said |= set(found)
        path.write_bytes(whole)
    assert any("its header" in line for line in said)
    assert any("parameter" in line for line in said)


def test_the_bytes_of_the_marker_count(folder: Path) -> None:
    shutil.rmtree(folder / "run2")
    path = folder / "run1" / FINISHED
    whole = path.read_bytes()
    for position in range(0, len(whole) - 1, 3):
        flip(path, position)
        found = problems(folder)
        assert found, f"byte {position} was flipped and nobody noticed"
        assert all(line.startswith("run run1: ") and FINISHED in line for line in found)
        path.write_bytes(whole)


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_a_cut_file_is_named(folder: Path, size: int) -> None:
    path = folder / "run1" / RUN
    path.write_bytes(path.read_bytes()[:size])
    (line,) = problems(folder)
    assert line.startswith("run run1: run.safetensors: ")
    assert "damaged" in line


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "run1" / RUN).unlink()
    path = folder / "run1" / RUN
    assert problems(folder) == [f"run run1: run.safetensors: no such file: {path}"]


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null", '"text"'])
def test_a_garbled_marker_is_named(folder: Path, content: str) -> None:
    (folder / "run1" / FINISHED).write_text(content)
    (line,) = problems(folder)
    assert line.startswith("run run1: finished.json: ")
    with pytest.raises(UsageError, match=r"run1/finished\.json"):
        Corpus(folder).read("run1")


def test_runs_of_the_first_version_have_a_hash_of_the_file_only(folder: Path) -> None:
    marker = read_json(folder / "run1" / FINISHED)
    write_json(folder / "run1" / FINISHED, {"sha256": marker["sha256"]})
    assert problems(folder) == []
    flip(folder / "run1" / RUN, -1)
    (line,) = problems(folder)
    assert line == ("run run1: run.safetensors: it is not what was written (the SHA-256 differs)")


def test_a_row_of_a_later_version_may_have_more_columns_than_were_written(folder: Path) -> None:
    path = folder / "run1" / FINISHED
    marker = read_json(path)
    del marker["row"]["seconds"]
    write_json(path, marker)
    assert problems(folder) == []
    write_json(path, marker | {"row": marker["row"] | {"seed": 7}})
    assert problems(folder) == ["run run1: finished.json: its entry 'row' is not what was written"]


def test_without_its_marker_a_run_is_unfinished_not_damaged(folder: Path) -> None:
    (folder / "run1" / FINISHED).unlink()
    assert list(verify(folder)) == [("run1", []), ("run2", [])]
    assert [run.name for run in Corpus(folder).folders()] == ["run2"]


def test_levels_and_card_of_an_unfinished_run_are_read(folder: Path) -> None:
    levels = folder / "half" / "levels"
    for level in range(2):
        path = levels / f"{level:02d}" / "level.safetensors"
        write_tensors(path, {"mask/a": torch.zeros(2)}, {"level": level})
    (folder / "half" / "card.json").write_text("{}")
    assert problems(folder) == []
    (levels / "01" / "level.safetensors").write_bytes(b"1234")
    (folder / "half" / "card.json").write_text("{'")
    found = problems(folder)
    assert [line.split(": ")[:2] for line in found] == [
        ["run half", "level.safetensors"],
        ["run half", "card.json"],
    ]
    assert "levels/01/level.safetensors" in found[0]


def test_a_run_that_failed_before_it_began_is_not_damaged(folder: Path) -> None:
    write_json(folder / "failed" / "failed.json", {"error": "no such option"})
    assert problems(folder) == []


# merge


def test_merge_copies_finished_runs_and_finds_them_again(folder: Path, tmp_path: Path) -> None:
    more, into = tmp_path / "more", tmp_path / "deep" / "all"
    store.write_run(more / "run3", tiny_run("run3"))
    (more / "half").mkdir()
    assert merge([folder, more], into) == (["run1", "run2", "run3"], [])
    assert sorted(path.name for path in into.iterdir()) == ["index.parquet", "run1", "run2", "run3"]
    for run in (*Corpus(folder).folders(), *Corpus(more).folders()):
        for path in run.iterdir():
            assert (into / run.name / path.name).read_bytes() == path.read_bytes()
    assert problems(into) == []
    assert merge([folder, more], into) == ([], ["run1", "run2", "run3"])


def test_merge_leaves_a_run_alone_that_another_process_makes(folder: Path, tmp_path: Path) -> None:
    into = tmp_path / "all"
    with holder(into / "run1") as process:
        with pytest.raises(
            RunFailed, match=f"^1 runs copied; .*run1 is being worked on .*{process.pid}"
        ):
            merge([folder], into)
        assert [path.name for path in (into / "run1").iterdir()] == ["claim.lock"]
    assert merge([folder], into) == (["run1"], ["run2"])
    assert not list(into.glob("*/claim.lock"))


def test_merge_leaves_out_what_is_damaged(folder: Path, tmp_path: Path) -> None:
    flip(folder / "run1" / RUN, -1)
    with pytest.raises(RunFailed, match=r"^1 runs copied; run run1: run\.safetensors: parameter"):
        merge([folder], tmp_path / "all")
    assert [run.name for run in Corpus(tmp_path / "all").folders()] == ["run2"]
    assert not (tmp_path / "all" / "run1").exists()
    assert [row["run_id"] for row in Corpus(tmp_path / "all").table()] == ["run2"]


@pytest.mark.parametrize("content", ["{", "{}"])
@pytest.mark.parametrize("there", [True, False])
def test_merge_survives_a_garbled_marker(
    folder: Path, tmp_path: Path, content: str, there: bool
) -> None:
    into = tmp_path / "all"
    if there:
        shutil.copytree(folder, into)
    (folder / "run1" / FINISHED).write_text(content)
    with pytest.raises(RunFailed, match=r"run run1: finished\.json"):
        merge([folder], into)
    assert (into / "run1").exists() == there
    assert problems(into) == []


def test_merge_keeps_what_was_there_when_the_other_differs(folder: Path, tmp_path: Path) -> None:
    into = tmp_path / "all"
    store.write_run(into / "run1", tiny_run("run1", scale=2.0))
    before = (into / "run1" / RUN).read_bytes()
    with pytest.raises(RunFailed, match=r"^1 runs copied; .*run1 differ; kept .*all/run1$"):
        merge([folder], into)
    assert (into / "run1" / RUN).read_bytes() == before
    assert [run.name for run in Corpus(into).folders()] == ["run1", "run2"]


def test_merge_takes_a_run_of_other_seconds_for_the_same(folder: Path, tmp_path: Path) -> None:
    into = tmp_path / "all"
    run = tiny_run("run1")
    for level in run.card["levels"]:
        level["seconds"] += 1
    store.write_run(into / "run1", run)
    assert (into / "run1" / RUN).read_bytes() != (folder / "run1" / RUN).read_bytes()
    assert merge([folder], into) == (["run2"], ["run1"])


def test_merge_copies_nothing_when_a_source_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        merge([folder, tmp_path / "nowhere"], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_merge_and_verify_between_places(folder: Path, remote: Path, tmp_path: Path) -> None:
    assert merge([folder], str(remote)) == (["run1", "run2"], [])
    assert list(verify(str(remote))) == [("run1", []), ("run2", [])]
    assert merge([str(remote)], tmp_path / "back") == (["run1", "run2"], [])
    assert (tmp_path / "back" / "run1" / RUN).read_bytes() == (folder / "run1" / RUN).read_bytes()
    path = remote / "run2" / RUN
    path.write_bytes(path.read_bytes()[:-1])
    (line,) = problems(remote)
    assert line.startswith("run run2: run.safetensors: ")


def test_a_problem_is_one_line() -> None:
    assert str(upkeep.Problem("r", "f", "is missing")) == "run r: f: is missing"
