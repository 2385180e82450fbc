"""A study from either way in: failures named, every cell tracked, the best registered."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from autosparse.core.errors import RunFailed
from autosparse.core.files import read_json
from autosparse.integrations import JOB_VARIABLE, registry, studies, tracking
from autosparse.integrations.mlflow import client
from autosparse.study import plan, table
from autosparse.study.trainings import RESULT
from tests.conftest import quick_irp
from tests.integration.ranks import free_port
from tests.study.small import comparison


@pytest.fixture()
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path / "mlflow.db"


def test_a_comparison_goes_on_after_a_failure_and_its_best_is_registered(
    tmp_path: Path, database: Path
):
    settings = comparison(
        tmp_path / "out", criteria=["magnitude"], seeds=[0], twins=["shuffled"], tracking=True,
        variations=[{"optimizer": "sgd", "learning_rate": 1e30}, {}],
    )  # fmt: skip
    done = studies.run(settings)
    assert [cell.state for cell in done.cells] == ["failed"] * 3 + ["finished"] * 3
    with pytest.raises(RunFailed, match="3 of 6 cells failed"):
        studies.raise_if_failed(done)
    found, experiment = client(done.folder)
    runs = {run.data.tags.get("cell"): run for run in found.search_runs([experiment])}
    assert {cell.key for cell in done.cells} | {None} == set(runs)
    for cell in done.cells:
        run = runs[cell.key]
        assert run.data.tags["mlflow.parentRunId"] == runs[None].info.run_id
        assert run.info.status == ("FINISHED" if cell.over else "FAILED")
        if cell.over:
            assert run.data.metrics["final/test_accuracy"] == cell.result()["test_accuracy"]
    table.write_report(settings, table.table(done.cells), done.cells)
    rows = registry.add(done.folder)
    assert [(row["model"], row["aliases"]) for row in rows] == [
        ("test_byobnet-sparse", "champion, sparsity-50")
    ]


def test_a_comparison_goes_on_without_mlflow_and_tells_it_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    settings = comparison(
        tmp_path / "out", criteria=["magnitude"], seeds=[0], twins=[], tracking=True
    )
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    studies.run(settings)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    (tmp_path / "out/cells").rename(tmp_path / "cells")

    def fails(*_):
        raise MlflowException("the database is locked")

    with monkeypatch.context() as patch:
        patch.setattr(tracking, "log_result", fails)
        done = studies.run(settings)
    assert [cell.state for cell in done.cells] == ["finished"] * 2
    table.write_report(settings, table.table(done.cells), done.cells)
    tracking.log_study(tmp_path / "out/comparison.json", table.table(done.cells))
    assert capsys.readouterr().err.count("MLflow cannot be told") == 2
    done = studies.run(settings)
    found, experiment = client(done.folder)
    runs = found.search_runs([experiment], "tags.cell LIKE '%'")
    assert {run.data.tags["cell"] for run in runs} == {cell.key for cell in done.cells}
    assert {run.info.status for run in runs} == {"FINISHED"}


@pytest.mark.parametrize("where", ["here", "in a job", "as an earlier version", "not here"])
def test_a_corpus_is_tracked_where_all_else_is(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    beside = tmp_path / "corpus" / "mlflow.db"
    beside.parent.mkdir()
    if where == "in a job":
        monkeypatch.setenv(JOB_VARIABLE, "{}")
    if where == "as an earlier version":
        beside.touch()
    if where == "not here":  # As where the folder may only be read; root may write anywhere.
        access = os.access
        monkeypatch.setattr(
            os, "access", lambda path, mode: access(path, mode) and path != tmp_path
        )
    run = quick_irp(str(tmp_path / "corpus"))
    with tracking.corpus_tracker({"run": run}, tmp_path / "corpus") as tracker:
        assert tracker is not None
        tracker.levels("run", [dict.fromkeys(tracking.LEVEL, 0)])
        tracker.end("run", None)
    here = tmp_path / "mlflow.db"
    assert (here.exists(), beside.exists()) == (where == "here", where != "here")
    server, experiment = client(tmp_path / "corpus")
    assert len(server.search_runs([experiment])) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_deepspeed_trains_cells_that_a_comparison_finds(tmp_path: Path):
    changes = {"criteria": ["magnitude"], "seeds": [0], "twins": ["shuffled"]}
    done = studies.run(comparison(tmp_path / "out", executor="deepspeed", **changes))
    assert [cell.state for cell in done.cells] == ["finished"] * 3
    for cell in done.cells:
        settings = read_json(cell.folder / "settings.json")
        assert settings["ranks"] == 2 and settings["deepspeed"]["zero_optimization"]["stage"] == 1
    here = plan.cells(comparison(tmp_path / "out", **changes))
    assert all((cell.folder / RESULT).is_file() and cell.over for cell in here)
