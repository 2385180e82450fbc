"""A sweep whose driver and then whole cluster are killed: no cell twice, no run twice."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

import autosparse
from autosparse.core.files import read_json

ROOT = Path(autosparse.__file__).parent.parent
CELLS, LIMIT = 2 + 3 * 3 * 2, 720
"""Two dense networks, and three criteria at three sparsities with two seeds; seconds."""


def start(out: Path) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{out}/mlflow.db"
    command = [sys.executable, "ray_jobs/sweep_sparsity.py", "--config",
               "configs/sweep/digits.yaml", "--twins", "[]", "--out", str(out)]  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def done(out: Path) -> dict[str, int]:
    return {p.parent.name: p.stat().st_mtime_ns for p in out.glob("cells/*/result.json")}


def wait(driver: subprocess.Popen, out: Path, cells: int, started: float) -> None:
    while len(done(out)) < cells and driver.poll() is None:
        assert time.monotonic() - started < LIMIT, "it hangs"
        time.sleep(0.1)
    assert driver.poll() is None, driver.stderr.read()[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(LIMIT + 120)
def test_a_sweep_that_is_killed_twice_ends_as_if_unbroken(tmp_path: Path) -> None:
    started = time.monotonic()
    driver = start(tmp_path)
    wait(driver, tmp_path, 4, started)
    driver.kill()
    driver.wait()
    first = done(tmp_path)
    driver = start(tmp_path)
    wait(driver, tmp_path, 10, started)
    cluster = psutil.Process(driver.pid).children(recursive=True)
    for process in [psutil.Process(driver.pid), *cluster]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    driver.wait()
    assert len(cluster) >= 4, "GCS, raylet and workers"
    second = done(tmp_path)
    for path in tmp_path.glob("tune/**/tuner.pkl"):
        path.write_bytes(b"")
    driver = start(tmp_path)
    _, errors = driver.communicate(timeout=LIMIT)
    assert driver.returncode == 0, errors[-3000:]
    whole = done(tmp_path)
    assert len(whole) == CELLS
    assert all(whole[cell] == when for cell, when in (first | second).items()), "done twice"
    assert len(read_json(tmp_path / "sweep.json")["results"]) == CELLS
    assert (tmp_path / "report.html").is_file()
    check_runs(tmp_path)
    print(f"{time.monotonic() - started:.0f} s")


def check_runs(out: Path) -> None:
    """One run per cell, nested in one parent, every epoch logged once."""
    from mlflow import MlflowClient

    found = MlflowClient(f"sqlite:///{out}/mlflow.db")
    experiment = found.get_experiment_by_name("autosparse").experiment_id
    runs = found.search_runs([experiment], max_results=1000)
    counts = Counter(run.data.tags.get("cell", "parent") for run in runs)
    assert len(counts) == CELLS + 1 and set(counts.values()) == {1}
    (parent,) = [run.info.run_id for run in runs if "cell" not in run.data.tags]
    for run in runs:
        assert run.info.status == "FINISHED"
        if run.info.run_id != parent:
            assert run.data.tags["mlflow.parentRunId"] == parent
            steps = [m.step for m in found.get_metric_history(run.info.run_id, "train_loss")]
            assert sorted(steps) == list(range(1, 9))
