"""What earlier versions wrote is read, found under the same ids, and not done again."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from autosparse.autos.network import AutoS
from autosparse.cli import studies, verbs
from autosparse.cli.arguments import guarded
from autosparse.cli.main import _main
from autosparse.corpus.store import Corpus
from autosparse.criteria.config import PruneConfig
from autosparse.data import sets
from autosparse.data.config import DataConfig
from autosparse.irp.config import IRPConfig
from autosparse.irp.run import run_folder
from autosparse.models.config import ModelConfig
from autosparse.sparsity.ticket import Ticket
from autosparse.study import plan, tickets
from autosparse.study.config import SparseTrainConfig, StudyConfig, SweepConfig
from autosparse.study.grid import StudyCell
from tests.conftest import QUICK

FIXTURES = Path(__file__).parent / "fixtures" / "before_packages"
MODEL = ModelConfig(
    "vit_tiny_patch16_224", {"embed_dim": 8, "depth": 1, "num_heads": 2, "patch_size": 8}
)
DATA = DataConfig(train_limit=200)
COMPARISON = StudyConfig(
    model=MODEL, data=DATA, criteria=["snip", "fast", "irp"],
    options={"fast": {"criterion": "synflow", "rounds": 3}, "irp": {"levels": 1}},
    sparsities=[0.5], seeds=[0], twins=["shuffled", "inverted", "uniform"], training=QUICK,
    device="cpu", tracking=False,
)  # fmt: skip
SWEEP = SweepConfig(
    models=[MODEL], data=DATA, criteria=["magnitude"], sparsities=[0.5], seeds=[0], training=QUICK,
    variations=[{}, {"learning_rate": 0.01}, {"learning_rate": 1e30, "optimizer": "sgd"}],
    tracking=False,
)  # fmt: skip
SEARCH = replace(
    SWEEP, search="optuna", samples=2, variations=[{}], asha=True,
    space={"learning_rate": {"low": 0.001, "high": 0.1, "log": True}},
)  # fmt: skip


@pytest.fixture()
def earlier(tmp_path: Path) -> Path:
    """A copy of what the version before the packages wrote."""
    return Path(shutil.copytree(FIXTURES, tmp_path / "earlier"))


def results(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.rglob("result.json")}


def test_nothing_in_the_fixtures_is_pickled():
    kinds = {path.suffix for path in FIXTURES.rglob("*") if path.is_file()}
    assert kinds == {".json", ".md", ".parquet", ".safetensors"}


def test_a_corpus_is_listed_and_fitted_on(earlier: Path, capsys):
    assert guarded(_main, ["corpus", "ls", str(earlier / "corpus")]) == 0
    assert guarded(_main, ["corpus", "verify", str(earlier / "corpus")]) == 0
    out = earlier / "again.safetensors"
    fitting = ["fit", "--corpus", str(earlier / "corpus"), "--epochs", "1", "--out", str(out)]
    assert guarded(_main, fitting) == 0, capsys.readouterr().err
    mine, theirs = AutoS.load(out), AutoS.load(earlier / "autos.safetensors")
    assert mine.card["corpus"] == theirs.card["corpus"] == Corpus(earlier / "corpus").fingerprint


def test_irp_runs_keep_their_ids(earlier: Path):
    for seed, name in ((0, "6f90998c34ee"), (1, "70589b790676")):
        run = IRPConfig(model=MODEL, data=DATA, training=QUICK, levels=2, final_density=0.25,
                        seed=seed, out=str(earlier / "corpus"))  # fmt: skip
        assert run_folder(run).name == name
        assert len(Corpus(earlier / "corpus").read(name).survival) == 6


def test_a_ticket_is_loaded(earlier: Path, capsys):
    ticket = Ticket.load(earlier / "ticket.safetensors")
    assert (ticket.kept, ticket.fingerprint) == (680, "4f64919fec82e1cb")
    assert guarded(_main, ["inspect", str(earlier / "ticket.safetensors")]) == 0
    assert "snip" in capsys.readouterr().out


def test_a_training_is_found(earlier: Path, capsys):
    before = results(earlier / "trained")
    prune = PruneConfig(model=MODEL, data=DATA, criterion="magnitude", sparsity=0.5)
    verbs.train_tickets(
        SparseTrainConfig(
            prune=prune, training=QUICK, device="cpu", tracking=False, out=str(earlier / "trained")
        )
    )
    assert results(earlier / "trained") == before
    assert "magnitude" in capsys.readouterr().out


def test_a_comparison_is_found(earlier: Path, capsys):
    before = results(earlier / "comparison")
    assert len(before) == 11
    studies.run(replace(COMPARISON, out=str(earlier / "comparison")))
    assert results(earlier / "comparison") == before
    assert "11 of them found" in capsys.readouterr().out


def test_figures_and_page_of_earlier_folders_are_drawn(earlier: Path):
    verbs.write_reports([str(earlier / "comparison"), str(earlier / "sweep")])
    for name in ("comparison", "sweep"):
        assert (earlier / name / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("config", "states"),
    [(SWEEP, ["finished"] * 4 + ["failed"] * 2), (SEARCH, ["finished"] * 3)],
    ids=["grid", "optuna"],
)
def test_cells_of_a_sweep_are_found(earlier: Path, config: SweepConfig, states: list[str]):
    folder = earlier / ("search" if config.search == "optuna" else "sweep")
    cells = plan.cells(replace(config, out=str(folder)))
    assert [cell.state for cell in cells] == states
    assert {cell.key for cell in cells} == {each.name for each in (folder / "cells").iterdir()}


def test_an_earlier_ticket_serves_twins_of_today(earlier: Path, monkeypatch):
    config = replace(COMPARISON, out=str(earlier / "comparison"))
    cell = StudyCell(config, "snip", "reinitialised", 0.5, 0)
    monkeypatch.setattr(tickets, "_make", None)
    assert tickets.ticket_of(cell, sets.load(DATA)).fingerprint == "4f64919fec82e1cb"
