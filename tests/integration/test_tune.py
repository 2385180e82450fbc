"""A sweep with Ray Tune: cells done once, failures named, ASHA within groups, MLflow in step."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from autosparse.core.errors import RunFailed, UsageError
from autosparse.core.files import read_json, write_json
from autosparse.data.config import DataConfig
from autosparse.integrations import studies, tune
from autosparse.study import grid, local, plan, search
from autosparse.study.trainings import RESULT
from tests.study.small import result
from tests.study.small import sweep as config

ONE_AT_A_TIME = float(os.cpu_count() or 1)
"""CPUs of a cell: one process, whose start takes longest, does one cell after another."""


def two_of_four(out: Path):
    """Two cells that can be trained and two that cannot."""
    return config(
        out, criteria=["magnitude"], sparsities=[0.5], seeds=[0], tracking=True,
        cpus_per_trial=ONE_AT_A_TIME,
        variations=[{}, {"optimizer": "sgd", "learning_rate": 1e30}],
    )  # fmt: skip


@pytest.fixture(scope="module")
def swept(local_ray, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("sweep")
    before = os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{out}/mlflow.db"
    yield studies.run(two_of_four(out))
    del os.environ["MLFLOW_TRACKING_URI"]
    if before:
        os.environ["MLFLOW_TRACKING_URI"] = before


def runs_of(folder: Path) -> list:
    from autosparse.integrations.mlflow import client

    found, experiment = client(folder)
    return found.search_runs([experiment])


def test_cells_are_done_and_failures_named(swept: studies.Done):
    states = sorted(cell.state for cell in swept.cells)
    assert states == ["failed", "failed", "finished", "finished"]
    failed = [cell.error() for cell in swept.cells if cell.state == "failed"]
    assert all("the loss is" in error for error in failed)
    with pytest.raises(RunFailed, match="2 of 4 cells failed"):
        studies.raise_if_failed(swept)
    assert not (swept.folder / tune.TUNE).exists()


def test_every_cell_has_one_run_nested_in_the_sweeps(swept: studies.Done):
    runs = runs_of(swept.folder)
    (parent,) = [run for run in runs if "cell" not in run.data.tags]
    nested = {run.data.tags["cell"]: run for run in runs if "cell" in run.data.tags}
    assert len(runs) == 5 and sorted(nested) == sorted(cell.key for cell in swept.cells)
    for cell in swept.cells:
        run = nested[cell.key]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == ("FINISHED" if cell.state == "finished" else "FAILED")
        assert run.inputs.dataset_inputs[0].dataset.name == "digits"
        if cell.state == "finished":
            full = read_json(cell.folder / RESULT)
            assert run.data.metrics["final/test_accuracy"] == full["test_accuracy"]
            assert run.data.metrics["train_loss"] == full["history"][-1]["train_loss"]


@pytest.mark.slow
def test_started_again_it_does_only_what_failed_and_logs_nothing_twice(swept: studies.Done):
    from autosparse.integrations.mlflow import client

    before = {p: p.stat().st_mtime_ns for p in swept.folder.glob(f"cells/*/{RESULT}")}
    found, _ = client(swept.folder)
    lost = next(run for run in runs_of(swept.folder) if run.info.status == "FINISHED"
                and "cell" in run.data.tags)  # fmt: skip
    found.update_run(lost.info.run_id, status="RUNNING")  # As if killed before it was closed.
    again = studies.run(two_of_four(swept.folder))
    assert len(again.found) == 2
    assert {p: p.stat().st_mtime_ns for p in before} == before
    runs = runs_of(swept.folder)
    assert len(runs) == 5
    assert found.get_run(lost.info.run_id).info.status == "FINISHED"
    for run in runs:
        steps = [m.step for m in found.get_metric_history(run.info.run_id, "train_loss")]
        assert len(steps) == len(set(steps))


def epoch(number: int, accuracy: float) -> dict:
    return {"epoch": number, tune.METRIC: accuracy}


def test_asha_never_holds_different_sparsities_against_each_other(tmp_path: Path):
    settings = config(tmp_path, asha=True, asha_factor=2, criteria=["snip", "magnitude"], seeds=[0])
    cells = {(c.label, c.sparsity): c for c in plan.cells(settings)}
    trials = {
        key: SimpleNamespace(trial_id=cell.key, config={"key": key}) for key, cell in cells.items()
    }
    scheduler = tune.PerGroup(settings, lambda suggestion: cells[suggestion["key"]], [])
    for trial in trials.values():
        scheduler.on_trial_add(None, trial)

    def told(label: str, sparsity: float, accuracy: float) -> str:
        return scheduler.on_trial_result(None, trials[label, sparsity], epoch(1, accuracy))

    assert told("snip", 0.5, 0.9) == "CONTINUE"
    assert told("snip", 0.8, 0.2) == "CONTINUE", "alone at its sparsity"
    assert told("magnitude", 0.5, 0.3) == "STOP"
    assert told("magnitude", 0.8, 0.3) == "CONTINUE", "better than the other at 80 %"


def test_asha_remembers_what_finished_before(tmp_path: Path):
    settings = config(tmp_path, asha=True, asha_factor=2, sparsities=[0.5], seeds=[0])
    cells = {c.label: c for c in plan.cells(settings)}
    result(cells["snip"], 0.9)
    scheduler = tune.PerGroup(settings, lambda _: cells["magnitude"], list(cells.values()))
    trial = SimpleNamespace(trial_id="new", config={})
    scheduler.on_trial_add(None, trial)
    assert scheduler.on_trial_result(None, trial, epoch(1, 0.3)) == "STOP"


def test_optuna_that_is_missing_is_said_in_one_line(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    settings = config(tmp_path / "out", search="optuna", space={"learning_rate": [0.1, 0.2]})
    with pytest.raises(UsageError, match=r"pip install 'autosparse\[optuna\]'"):
        studies.run(settings)
    assert not (tmp_path / "out").exists()


def test_a_suggestion_is_written_down_when_its_cell_begins(tmp_path: Path, monkeypatch):
    """Whoever asks which cell a suggestion is (brackets, bars, MLflow) leaves no file."""
    pytest.importorskip("optuna")
    settings = config(tmp_path, search="optuna", sparsities=[0.5], space={"learning_rate": [0.1]})
    handed: list[dict] = []
    monkeypatch.setattr(
        tune,
        "_tune",
        lambda config, resolve, *_, **more: handed.append({"resolve": resolve, **more}),
    )
    tune._search(settings, (0, 0.5), SimpleNamespace())  # type: ignore[arg-type]
    suggestion = {"label": "snip", "learning_rate": 0.1}
    cell = handed[0]["resolve"](suggestion)
    assert not list(tmp_path.rglob("*"))
    assert handed[0]["begin"](suggestion).key == cell.key
    assert [path.parent for path in tmp_path.rglob("*.json")] == [cell.folder]
    assert search.points(settings, 0, 0.5) == [suggestion]


@pytest.mark.slow
def test_optuna_goes_on_from_what_is_over(local_ray, tmp_path: Path):
    pytest.importorskip("optuna")
    settings = config(
        tmp_path, search="optuna", samples=2, sparsities=[0.5], seeds=[0],
        cpus_per_trial=ONE_AT_A_TIME,
        space={"learning_rate": {"low": 0.001, "high": 0.1, "log": True}},
    )  # fmt: skip
    (dense,) = plan.cells(settings)
    result(dense, 0.5)
    first = studies.run(settings)
    assert [cell.state for cell in first.cells] == ["finished"] * 3, "dense and two samples"
    again = studies.run(replace(settings, samples=3))
    assert len(again.found) == 3 and len(again.cells) == 4


def test_cells_that_do_not_fit_are_refused(local_ray, tmp_path: Path):
    with pytest.raises(UsageError, match="a cell asks for 1000 CPU"):
        studies.run(config(tmp_path, cpus_per_trial=1000.0))


def test_a_stopped_cell_is_not_done_again(local_ray, tmp_path: Path):
    settings = config(tmp_path, asha=True, criteria=["magnitude"], sparsities=[0.5], seeds=[0])
    dense, ticket = plan.cells(settings)
    result(dense, 0.5)
    write_json(ticket.folder / grid.STOPPED, {"history": [epoch(1, 0.1)]})
    swept = studies.run(settings)
    assert sorted(swept.found) == sorted([dense.key, ticket.key])
    assert not (ticket.folder / RESULT).exists()


def test_a_worker_that_is_used_again_reads_the_data_of_its_sweep(tmp_path: Path):
    sizes = []
    for limit in (100, 200, 100):
        cells = plan.cells(config(tmp_path, data=DataConfig(train_limit=limit)))
        sizes.append(len(local.load(cells[0].config).train))
    assert sizes == [100, 200, 100]
