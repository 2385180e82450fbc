"""The corpus: finished runs only, damage named, index derived."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet
import pytest
import torch

from autosparse import corpus, irp
from autosparse.corpus import Corpus
from autosparse.errors import UsageError
from tests.conftest import quick_irp


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    initial = {"a.weight": torch.tensor([[0.5, -1.0], [2.0, 0.25]])}
    survival = {"a.weight": torch.tensor([[0, 1], [2, 2]], dtype=torch.uint8)}
    card = {
        "run_id": "run1",
        "prunable": ["a.weight"],
        "prunable_weights": 4,
        "model": {},
        "versions": {},
        "config": {
            "model": {"name": "m"}, "data": {"name": "d"}, "seed": 0, "label": "magnitude",
            "schedule": "linear", "levels": 2, "final_density": 0.5,
        },
        "levels": [
            {"validation_accuracy": 0.5 + level / 10, "seconds": 2.0} for level in range(3)
        ],
    }  # fmt: skip
    run = corpus.IRPRun(initial, survival, {"a.bias": torch.zeros(2)}, card)
    corpus.write_run(tmp_path / "run1", run)
    return tmp_path


def test_masks_are_survival_at_least_level(folder: Path) -> None:
    run = corpus.read_run(folder / "run1")
    assert run.masks(0)["a.weight"].tolist() == [[True, True], [True, True]]
    assert run.masks(1)["a.weight"].tolist() == [[False, True], [True, True]]
    assert run.masks(2)["a.weight"].tolist() == [[False, False], [True, True]]
    with pytest.raises(UsageError, match="levels 0 to 2"):
        run.masks(3)


def test_tickets_hold_the_survivors_initial_values(folder: Path) -> None:
    ticket = corpus.read_run(folder / "run1").ticket(2)
    assert ticket.values["a.weight"].tolist() == [2.0, 0.25]
    assert ticket.sparsity == 0.5


def test_unfinished_runs_are_not_part_of_it(folder: Path) -> None:
    (folder / "half" / "levels" / "00").mkdir(parents=True)
    (folder / "half" / "card.json").write_text("{}")
    assert [path.name for path in Corpus(folder).folders()] == ["run1"]
    with pytest.raises(UsageError, match="no finished IRP run"):
        corpus.read_run(folder / "half")


def test_a_changed_file_is_noticed(folder: Path) -> None:
    path = folder / "run1" / corpus.RUN
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UsageError, match=r"run1/run\.safetensors.*SHA-256"):
        corpus.read_run(folder / "run1")


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
