"""Costs in MLflow: in the training's run, or in one of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from autosparse.core.files import write_json
from autosparse.integrations.measured import log_measured, metrics
from autosparse.integrations.mlflow import RUN_FILE, client

LATENCY = {"ms": 2.0, "quartiles": [1.9, 2.2], "of_first": 0.5}
FOUND = {
    "rows": {
        "dense": {"parameters": 90, "flops": 1000},
        "slimmed": {"parameters": 12, "latency": {"onnxruntime 32": LATENCY}},
    },
    "layers": {},
}
EXPECTED = {
    "cost.dense.parameters": 90,
    "cost.dense.flops": 1000,
    "cost.slimmed.parameters": 12,
    "cost.slimmed.ms.onnxruntime_batch_32": 2.0,
    "cost.slimmed.of_dense.onnxruntime_batch_32": 0.5,
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return tmp_path


def test_names_of_metrics() -> None:
    assert metrics(FOUND) == EXPECTED


def test_a_run_of_its_own_and_the_run_of_a_training(place: Path) -> None:
    server, experiment = client()
    run = server.get_run(log_measured("resnet18", FOUND))
    assert (run.info.run_name, run.info.status) == ("measure resnet18", "FINISHED")
    assert run.data.metrics == EXPECTED
    training = server.create_run(experiment).info.run_id
    write_json(place / RUN_FILE, {"key": "abc", "run_id": training})
    assert log_measured(str(place), FOUND) == training
    assert server.get_run(training).data.metrics == EXPECTED
    assert server.get_run(training).info.status == "RUNNING"
