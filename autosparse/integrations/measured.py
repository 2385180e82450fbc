"""What a network costs, as metrics in MLflow."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mlflow.entities import Metric

from autosparse.integrations.mlflow import client, run_of


def metrics(found: dict[str, Any]) -> dict[str, float]:
    """Return what `study.measure.measured` found as metrics: `cost.NETWORK.FIGURE` -> value.

    Latencies are `cost.NETWORK.ms.ENGINE_batch_N`, and `of_dense` in place of `ms` their ratio to
    the first network.
    """
    named = {}
    for network, row in found["rows"].items():
        for key, value in row.items():
            if key != "latency":
                named[f"cost.{network}.{key}"] = float(value)
        for key, each in row.get("latency", {}).items():
            place = key.replace(" ", "_batch_")
            named[f"cost.{network}.ms.{place}"] = each["ms"]
            named[f"cost.{network}.of_dense.{place}"] = each["of_first"]
    return named


def log_measured(source: str, found: dict[str, Any]) -> str:
    """Log the costs of a ticket or model; return the run.

    That is the training's own run where `source` is its folder and it was tracked, else a new one.
    """
    server, experiment = client()
    own = run_of(server, Path(source))
    run = own or server.create_run(experiment, run_name=f"measure {source}").info.run_id
    now = round(1000 * time.time())
    server.log_batch(run, [Metric(key, value, now, 0) for key, value in metrics(found).items()])
    if own is None:
        server.set_terminated(run)
    return run
