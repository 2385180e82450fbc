"""The corpus: finished runs only, damage named, index derived."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest
import torch

from autosparse.core.errors import UsageError
from autosparse.core.files import read_json, read_tensors, write_json, write_tensors
from autosparse.corpus import store
from autosparse.corpus.store import FINISHED, INDEX, RUN, Corpus
from autosparse.irp import run as irp
from autosparse.report.corpus import level_rows
from tests.conftest import quick_irp, tiny_run


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    store.write_run(tmp_path / "run1", tiny_run())
    return tmp_path


def test_masks_are_survival_at_least_level(folder: Path) -> None:
    run = store.read_run(folder / "run1")
    assert run.masks(0)["a.weight"].tolist() == [[True, True], [True, True]]
    assert run.masks(1)["a.weight"].tolist() == [[False, True], [True, True]]
    assert run.masks(2)["a.weight"].tolist() == [[False, False], [True, True]]
    with pytest.raises(UsageError, match="levels 0 to 2"):
        run.masks(3)


def test_tickets_hold_the_survivors_initial_values(folder: Path) -> None:
    ticket = store.read_run(folder / "run1").ticket(2)
    assert ticket.values["a.weight"].tolist() == [2.0, 0.25]
    assert ticket.sparsity == pytest.approx(4 / 7)


def test_unfinished_runs_are_not_part_of_it(folder: Path) -> None:
    (folder / "half" / "levels" / "00").mkdir(parents=True)
    (folder / "half" / "card.json").write_text("{}")
    assert [path.name for path in Corpus(folder).folders()] == ["run1"]
    with pytest.raises(UsageError, match="no finished IRP run"):
        store.read_run(folder / "half")


def test_a_changed_file_is_noticed(folder: Path) -> None:
    path = folder / "run1" / store.RUN
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UsageError, match=r"run1/run\.safetensors.*SHA-256"):
        store.read_run(folder / "run1")


def test_a_run_that_was_copied_in_part_is_said(folder: Path) -> None:
    (folder / "run1" / store.RUN).unlink()
    with pytest.raises(UsageError, match=r"is half copied: finished\.json is there, run\.safet"):
        store.read_run(folder / "run1")


def test_a_corpus_without_finished_runs_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no finished run"):
        Corpus(tmp_path).cards()
    with pytest.raises(UsageError, match="not a folder"):
        Corpus(tmp_path / "nowhere")


def test_the_index_has_a_row_per_run_and_can_be_made_again(folder: Path) -> None:
    path = Corpus(folder).write_index()
    path.unlink()
    rows = pyarrow.parquet.read_table(Corpus(folder).write_index()).to_pylist()
    assert len(rows) == 1
    assert rows[0]["dense_accuracy"] == 0.5
    assert rows[0]["final_accuracy"] == pytest.approx(0.7)
    assert rows[0]["seconds"] == 6.0


def test_the_fingerprint_changes_with_the_runs(tmp_path: Path) -> None:
    irp.run_irp(quick_irp(str(tmp_path), levels=1))
    one = Corpus(tmp_path).fingerprint
    assert Corpus(tmp_path).fingerprint == one
    irp.run_irp(quick_irp(str(tmp_path), levels=1, seed=1))
    assert Corpus(tmp_path).fingerprint != one


# What is stored


def test_the_marker_holds_the_hash_of_the_file_and_of_every_tensor(folder: Path) -> None:
    marker = read_json(folder / "run1" / FINISHED)
    run = tiny_run()
    assert marker["sha256"] == hashlib.sha256((folder / "run1" / RUN).read_bytes()).hexdigest()
    assert set(marker["tensors"]) == {
        "survival/a.weight", "survival/b.weight", "initial/a.weight", "initial/b.weight",
        "rest/a.bias",
    }  # fmt: skip
    for name, tensor in run.survival.items():
        expected = hashlib.sha256(bytes(tensor.flatten().tolist())).hexdigest()
        assert marker["tensors"][f"survival/{name}"] == expected


def test_the_hash_of_a_tensor_is_that_of_its_bytes_in_row_major_order() -> None:
    tensor = torch.arange(6, dtype=torch.uint8).view(2, 3)
    expected = hashlib.sha256(bytes([0, 3, 1, 4, 2, 5])).hexdigest()
    assert store.sha256_of_tensor(tensor.t()) == expected
    nothing = hashlib.sha256(b"").hexdigest()
    assert store.sha256_of_tensor(torch.zeros(0, 4)) == nothing
    assert store.sha256_of_tensor(torch.tensor(1.0)) == hashlib.sha256(b"\0\0\x80?").hexdigest()


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run with its initial weights, and without."""
    out = tmp_path_factory.mktemp("corpora")
    config = [quick_irp(str(out / name), levels=1) for name in ("whole", "small")]
    whole = irp.run_irp(config[0])
    run = store.read_run(whole)
    store.write_run(out / "small" / whole.name, run, store_initial=False)
    return whole, out / "small" / whole.name


def size_of_tensors(path: Path) -> int:
    content = path.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


def test_without_its_initial_weights_a_run_takes_a_byte_per_weight(
    stored: tuple[Path, Path],
) -> None:
    whole, small = stored
    run = store.read_run(whole)
    weights = sum(tensor.numel() for tensor in run.survival.values())
    rest = sum(tensor.numel() * tensor.element_size() for tensor in run.rest.values())
    assert size_of_tensors(small / RUN) == weights
    assert size_of_tensors(whole / RUN) == 5 * weights + rest


def test_initial_weights_that_are_made_again_are_the_same_bit_for_bit(
    stored: tuple[Path, Path],
) -> None:
    whole, small = (store.read_run(folder) for folder in stored)
    for group in ("initial", "survival", "rest"):
        expected, found = getattr(whole, group), getattr(small, group)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name
    assert list(small.initial) == list(whole.initial)
    assert small.ticket(1).content_hash == whole.ticket(1).content_hash


def test_a_run_is_named_the_same_however_it_is_stored(tmp_path: Path) -> None:
    config = quick_irp(str(tmp_path), levels=1, store_initial=False)
    folder = irp.run_irp(config)
    assert folder == irp.run_folder(quick_irp(str(tmp_path), levels=1))
    assert not [name for name in read_tensors(folder / RUN)[0] if not name.startswith("survival/")]


def test_initial_weights_that_cannot_be_made_again_are_refused(
    stored: tuple[Path, Path], tmp_path: Path
) -> None:
    """As with another version of timm, which draws other weights from the same seed."""
    folder = Path(shutil.copytree(stored[1], tmp_path / stored[1].name))
    tensors, card = read_tensors(folder / RUN)
    write_tensors(folder / RUN, tensors, card | {"model": {**card["model"], "seed": 1}})
    sha256 = hashlib.sha256((folder / RUN).read_bytes()).hexdigest()
    write_json(folder / FINISHED, {"sha256": sha256})
    with pytest.raises(UsageError) as caught:
        store.read_run(folder)
    assert f"{folder}: its initial weights cannot be made again" in str(caught.value)
    assert f"'timm': '{card['versions']['timm']}'" in str(caught.value)


@pytest.mark.parametrize("content", ["{}", "[]", "{", "null"])
def test_a_garbled_marker_is_named(folder: Path, content: str) -> None:
    (folder / "run1" / FINISHED).write_text(content)
    for read in (
        lambda: store.read_run(folder / "run1"),
        lambda: Corpus(folder).fingerprint,
        lambda: Corpus(folder).table(),
        lambda: Corpus(folder).write_index(),
    ):
        with pytest.raises(UsageError, match=r"run1/finished\.json"):
            read()


# The table


def fake_runs(folder: Path, names: list[str]) -> None:
    """Write folders that hold nothing but their marker."""
    row = read_json(folder / "run1" / FINISHED)["row"]
    for name in names:
        marker = {"sha256": "0", "row": row | {"run_id": name, "seed": len(name)}}
        (folder / name).mkdir()
        (folder / name / FINISHED).write_text(json.dumps(marker))


def ids(folder: Path) -> list[str]:
    return [row["run_id"] for row in Corpus(folder).table()]


def test_rows_come_from_the_markers(folder: Path) -> None:
    assert Corpus(folder).table() == [{
        "run_id": "run1", "model": "m", "data": "d", "seed": 0, "label": "magnitude",
        "schedule": "linear", "levels": 2, "final_density": 0.5, "prunable_weights": 7,
        "dense_accuracy": 0.5, "final_accuracy": 0.7, "seconds": 6.0,
    }]  # fmt: skip


def test_rows_of_runs_of_the_first_version_come_from_their_cards(folder: Path) -> None:
    expected = Corpus(folder).table()
    marker = read_json(folder / "run1" / FINISHED)
    write_json(folder / "run1" / FINISHED, {"sha256": marker["sha256"]})
    assert Corpus(folder).table() == expected
    Corpus(folder).write_index()
    assert Corpus(folder).table() == expected


def test_a_thousand_runs_are_listed_from_the_index_alone(folder: Path) -> None:
    names = [f"{number:012x}" for number in range(1000)]
    fake_runs(folder, names)
    Corpus(folder).write_index()
    for name in names:  # Nothing in the folders is read.
        (folder / name / FINISHED).write_text("{")
    assert ids(folder) == [*names, "run1"]


def test_the_table_has_runs_that_the_index_lacks_and_not_those_that_are_gone(folder: Path) -> None:
    fake_runs(folder, ["a", "b", "c"])
    assert Corpus(folder).write_index() == folder / INDEX
    shutil.rmtree(folder / "b")
    fake_runs(folder, ["d"])
    (folder / "unfinished").mkdir()
    (folder / "report").mkdir()
    assert ids(folder) == ["a", "c", "d", "run1"]
    Corpus(folder).write_index()
    assert [row["run_id"] for row in pyarrow.parquet.read_table(folder / INDEX).to_pylist()] == [
        "a", "c", "d", "run1",
    ]  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet file, though long enough"])
def test_a_damaged_index_is_said_and_done_without(folder: Path, capsys, content: bytes) -> None:
    (folder / INDEX).write_bytes(content)
    assert ids(folder) == ["run1"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {folder / INDEX} is damaged")
    assert f"`autosparse corpus index {folder}` makes it anew" in line
    Corpus(folder).write_index()
    assert ids(folder) == ["run1"]
    assert capsys.readouterr().err == ""


def test_an_empty_corpus_has_an_empty_table(tmp_path: Path) -> None:
    assert Corpus(tmp_path).table() == []


def test_a_remote_corpus(remote: Path) -> None:
    run = tiny_run()
    store.write_run(remote / "run1", run)
    Corpus(remote).write_index()
    found = Corpus(str(remote))
    assert [folder.name for folder in found.folders()] == ["run1"]
    assert [row["run_id"] for row in found.table()] == ["run1"]
    assert [card["run_id"] for card in found.cards()] == ["run1"]
    for name, tensor in run.initial.items():
        assert torch.equal(found.read("run1").initial[name], tensor)


# Rows of the figures


def test_level_rows_are_what_the_levels_reached() -> None:
    common = {"run_id": "run7", "model": "m", "data": "d", "seed": 0, "label": "magnitude"}
    assert level_rows(tiny_run("run7").card) == [
        {**common, "level": 0, "density": 1.0, "accuracy": 0.5},
        {**common, "level": 1, "density": 0.75, "accuracy": 0.6},
        {**common, "level": 2, "density": 0.5, "accuracy": 0.7},
    ]
