"""The whole path: `autosparse quickstart`, twice."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from autosparse.core.files import read_json

pytestmark = pytest.mark.slow
COMMAND = [sys.executable, "-c", "from autosparse.cli.main import main; main()", "quickstart"]


@pytest.mark.timeout(1200)
def test_quickstart_makes_everything_and_finds_it_again(tmp_path: Path) -> None:
    command = [*COMMAND, "--out", str(tmp_path / "qs"), "--seeds", "2"]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-4000:]
    out = tmp_path / "qs"
    assert (out / "accuracy.png").is_file()
    assert (out / "autos.safetensors").is_file()
    results = {path: path.stat().st_mtime_ns for path in out.glob("study/cells/*/result.json")}
    assert len(results) == 2 * (6 * 2 + 1)
    settings = read_json(next(iter(results)).with_name("settings.json"))
    assert settings["ranks"] == 2 and settings["deepspeed"]["zero_optimization"]
    started = time.monotonic()
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr[-4000:]
    assert time.monotonic() - started < 60
    assert {path: path.stat().st_mtime_ns for path in results} == results
    assert "models:/test_byobnet-sparse@champion" in second.stdout
