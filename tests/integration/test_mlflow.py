"""MLflow on SQLite: runs, resumed without duplicates, and models that load without pickle."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autosparse import prune
from autosparse.autos.network import AutoS
from autosparse.core.errors import RunFailed
from autosparse.core.files import read_json, write_json
from autosparse.data.sets import DataSource
from autosparse.study.cells import Cell, cells
from autosparse.study.config import SparseTrainConfig
from autosparse.study.trainings import SETTINGS, TRAINED, train_cell
from autosparse.training.steppers import PlainStepper
from tests.conftest import QUICK, make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tracked")
    before = os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    os.environ["MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"] = "0.05"
    yield folder
    del os.environ["MLFLOW_TRACKING_URI"], os.environ["MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"]
    if before:
        os.environ["MLFLOW_TRACKING_URI"] = before


@pytest.fixture(scope="module")
def config(folder: Path, digits: DataSource) -> SparseTrainConfig:
    scorer = AutoS("context", [4])
    scorer.card = {
        "corpus": "c0ffee",
        "trained_on": ["a", "b"],
        "baseline_mse": 0.2,
        "best": {"validation_mse": 0.1, "validation_rank_correlation": 0.5},
    }
    scorer.save(folder / "autos.safetensors")
    options = {"scorer": str(folder / "autos.safetensors")}
    prune(make_model(), digits, "autos", 0.9, options=options).save(folder / "t.safetensors")
    return SparseTrainConfig(
        tickets=[str(folder / "t.safetensors")], training=QUICK, out=str(folder / "trained")
    )


@pytest.fixture(scope="module")
def trained(folder: Path, config: SparseTrainConfig, digits: DataSource) -> Cell:
    from autosparse.integrations.mlflow import Tracker

    (cell,) = cells(config)
    _interrupted(cell, config, digits, Tracker())
    _train(cell, config, digits, Tracker())
    return cell


def _train(cell: Cell, config: SparseTrainConfig, digits: DataSource, observer) -> None:
    def stepper(model, steps):
        return PlainStepper(model, config.training, steps)

    train_cell(cell, config, digits, stepper, device="cpu", observer=observer)


def _interrupted(cell: Cell, config: SparseTrainConfig, digits: DataSource, tracker) -> None:
    """Begin the cell's run as a process would that is killed in its first epoch."""
    tracker.begin(cell, config, {})


def test_a_resumed_cell_goes_on_in_the_same_run(trained: Cell, folder: Path) -> None:
    from autosparse.integrations.mlflow import client

    found, experiment = client()
    runs = found.search_runs([experiment])
    (run,) = runs
    assert (run.info.run_name, run.info.status) == ("t", "FINISHED")
    assert run.data.tags["ticket"] == trained.ticket.fingerprint
    assert run.data.params["training.optimizer"] == "adamw"
    assert run.data.metrics["final/test_accuracy"] == trained.result()["test_accuracy"]
    assert run.data.metrics["validation_accuracy"] == trained.result()["validation_accuracy"]
    files = {each.path for each in found.list_artifacts(run.info.run_id)}
    assert {TRAINED, SETTINGS, "ticket.safetensors"} <= files
    assert run.data.metrics["system/cpu_utilization_percentage"] >= 0


def test_a_run_that_was_deleted_is_made_anew(
    config: SparseTrainConfig, trained: Cell, tmp_path: Path
) -> None:
    from autosparse.integrations.mlflow import RUN_FILE, Tracker, client

    cell = replace(trained, folder=tmp_path)
    Tracker().begin(cell, config, {})
    first = read_json(tmp_path / RUN_FILE)
    client()[0].delete_run(first["run_id"])
    for missing in (first["run_id"], "0" * 32):
        write_json(tmp_path / RUN_FILE, {**first, "run_id": missing})
        tracker = Tracker()
        tracker.begin(cell, config, {})
        tracker.stopped(cell)
        again = read_json(tmp_path / RUN_FILE)
        assert again["key"] == first["key"] and again["run_id"] != missing
    client()[0].delete_run(again["run_id"])


def test_a_database_may_be_named_relative_to_here(tmp_path: Path, monkeypatch) -> None:
    from autosparse.integrations.mlflow import client

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    server, experiment = client()
    place = (tmp_path / "mlartifacts").as_uri()
    assert server.get_experiment(experiment).artifact_location == place


def test_settings_say_what_was_asked_and_where_it_ran(trained: Cell) -> None:
    settings = read_json(trained.folder / SETTINGS)
    assert settings["config"]["training"]["optimizer"] == "adamw"
    assert settings["config"]["data"]["train_limit"] == trained.data.train_limit
    assert settings["environment"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert (settings["ranks"], settings["deepspeed"]) == (1, {})


def test_a_run_that_fails_says_why(
    config: SparseTrainConfig, trained: Cell, tmp_path: Path, digits: DataSource
) -> None:
    from autosparse.integrations.mlflow import Tracker, client

    broken = replace(config, training=replace(QUICK, learning_rate=1e38), out=str(tmp_path))
    (cell,) = cells(broken)
    with pytest.raises(RunFailed):
        _train(cell, broken, digits, Tracker())
    found, experiment = client()
    (run,) = found.search_runs([experiment], "attributes.status = 'FAILED'")
    assert "loss is" in run.data.tags["error"]


LOAD = """
import os, sys
assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
import mlflow, torch
folder, *names = sys.argv[1:]
inputs = torch.load(folder + "/in.pt")
models = [mlflow.pytorch.load_model(f"models:/{name}@champion") for name in names]
torch.save([model(each) for model, each in zip(models, inputs)], folder + "/out.pt")
"""


def _loaded_in_a_fresh_process(inputs: dict[str, torch.Tensor], folder: Path) -> list[torch.Tensor]:
    """Return what the champions of the names find."""
    torch.save(list(inputs.values()), folder / "in.pt")
    subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), *inputs],
        env={**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
        check=True,
        capture_output=True,
    )
    return [found.detach() for found in torch.load(folder / "out.pt")]


@pytest.mark.slow
def test_champions_load_without_pickle_and_compute_the_same(
    trained: Cell, folder: Path, digits: DataSource, tmp_path: Path
) -> None:
    from autosparse.integrations import mlflow, promotion, registry
    from autosparse.models import zoo
    from autosparse.sparsity.ticket import Ticket, load_state

    path = trained.folder / TRAINED
    with mlflow.parent_run("parent", folder, str) as run:
        assert run is not None
        autos = registry.register_autos(folder / "autos.safetensors", run)
        sparse = registry.register_ticket(path, trained.result(), run)
        assert registry.register_ticket(path, trained.result(), run) == sparse
    promotion.set_alias("autos", promotion.CHAMPION, autos)
    promotion.set_alias("test_byobnet-sparse", promotion.CHAMPION, sparse)

    network = AutoS.load(folder / "autos.safetensors")
    model = zoo.from_recipe(trained.ticket.card["model"])
    load_state(model, Ticket.load(path))
    rows, images = torch.randn(7, 14), digits.prepare(digits.test.images[:5])
    inputs = {"autos": rows, "test_byobnet-sparse": images}
    predicted, logits = _loaded_in_a_fresh_process(inputs, tmp_path)
    assert torch.allclose(predicted, network(rows).detach(), atol=1e-5)
    assert torch.allclose(logits, model.eval()(images).detach(), atol=1e-4)

    version = mlflow.MlflowClient().get_model_version("test_byobnet-sparse", str(sparse))
    assert version.tags["criterion"] == "autos"
    assert version.tags["sparsity"] == "0.9"
    assert version.tags["corpus"] == "c0ffee"
    assert version.tags["autos_version"] == str(autos)
    assert version.tags["ticket"] == trained.ticket.fingerprint
    assert "test accuracy" in version.description
