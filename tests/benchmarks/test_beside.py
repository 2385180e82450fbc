"""Cells of a study trained by several processes, benchmarks/beside.py, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from autosparse.cli.arguments import parse
from autosparse.study.config import StudyConfig
from benchmarks.beside import in_order, rows

ROOT = Path(__file__).parents[2]
STUDY = {
    "model": {"name": "test_byobnet"},
    "data": {"name": "digits", "train_limit": 200},
    "criteria": ["random", "erk"],
    "sparsities": [0.9, 0.5],
    "seeds": [1, 0],
    "twins": [],
    "training": {"epochs": 1, "batch_size": 50, "learning_rate": 0.003, "checkpoint_epochs": 0},
    "device": "cpu",
    "tracking": False,
}


def beside(config: Path, folder: Path, minutes: float) -> str:
    """In a process of its own: it parts before its threads are at work, as pytest's may be."""
    command = [
        sys.executable, "-m", "benchmarks.beside", "--config", str(config), "--out", str(folder),
        "--processes", "2", "--minutes", str(minutes), "--json", str(folder / "rows.json"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_share_the_cells(tmp_path: Path) -> None:
    """All are trained once, the first sparsity first; without time nothing is begun."""
    config, folder = tmp_path / "study.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(STUDY))
    assert "0 of 10 trainings" in beside(config, folder, 0.0)
    said = beside(config, folder, 5.0)
    assert "10 of 10 trainings" in said
    named = [line.split(" ")[0] for line in said.splitlines() if "seed" in line]
    assert sorted(named) == sorted({*named}) and len(named) == 10, said
    study = parse(StudyConfig, ["--config", str(config), "--out", str(folder)], "study", "")
    cells = in_order(study)
    assert [cell.name for cell in cells[:6]] == [
        "dense-0-seed1", "dense-0-seed0",
        "random-90-seed1", "erk-90-seed1", "random-90-seed0", "erk-90-seed0",
    ]  # fmt: skip
    found = json.loads((folder / "rows.json").read_text())["rows"]
    assert found == json.loads(json.dumps(rows(cells)))
    assert all(0 <= row["test_accuracy"] <= 1 for row in found) and len(found) == 10
    assert "10 of 10 trainings" in beside(config, folder, 0.0)
