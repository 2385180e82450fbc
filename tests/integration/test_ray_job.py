"""Growing a corpus through `ray job submit`, on a cluster of one node."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import autosparse
from autosparse.corpus.store import Corpus

OTHER_PORTS = (
    "--dashboard-agent-listen-port", "--dashboard-agent-grpc-port", "--ray-client-server-port",
    "--metrics-export-port",
)  # fmt: skip
ROOT = Path(autosparse.__file__).parent.parent


@pytest.mark.slow
def test_ray_job_submit_grows_a_corpus(tmp_path: Path) -> None:
    """The README's command, on a cluster of one node, with a small plan."""
    config = tmp_path / "plan.yaml"
    config.write_text(
        "models: [{name: test_byobnet}]\ndata: [{name: digits, train_limit: 300}]\n"
        "training: {epochs: 1, batch_size: 100}\nlevels: 1\nout: corpus/tiny\n"
    )
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "AUTOSPARSE_HOME": str(tmp_path / "home"),
    }
    ray_command = str(Path(sys.executable).parent / "ray")
    port, dashboard = _free_port(), _free_port()
    subprocess.run([ray_command, "get-auth-token", "--generate"], env=environment, check=False)
    address = f"http://127.0.0.1:{dashboard}"
    start = [ray_command, "start", "--head", "--block", "--node-ip-address", "127.0.0.1",
             "--port", port, "--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard,
             "--num-cpus", "2"]  # fmt: skip
    for each in OTHER_PORTS:  # The tests' own Ray may have the usual ones.
        start += [each, _free_port()]
    submit = [ray_command, "job", "submit", "--address", address, "--working-dir", ".", "--",
              sys.executable, "ray_jobs/grow_corpus.py", "--config", str(config)]  # fmt: skip
    head = subprocess.Popen(start, env=environment, stdout=subprocess.DEVNULL)
    try:
        _wait_for(int(dashboard))
        source = _clean_copy(tmp_path)
        for _ in range(20):
            done = subprocess.run(
                submit, env=environment, cwd=source, capture_output=True, text=True, timeout=200,
                check=False,
            )  # fmt: skip
            if "No available agent" not in done.stderr:
                break
            time.sleep(3)
    finally:
        head.terminate()
        head.wait(timeout=30)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert len(Corpus(tmp_path / "home" / "corpus" / "tiny").folders()) == 1


def _clean_copy(tmp_path: Path) -> Path:
    """The source tree without what a work tree gathers; Ray uploads all of it."""
    copy = tmp_path / "source"
    for part in ("autosparse", "ray_jobs", "configs"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def _wait_for(port: int) -> None:
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"nothing listens on port {port} after a minute")


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
