"""The GPU benchmarks, run on a CPU at a tiny size, and the table of what they found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import table
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.goals import STAGES

ROOT = Path(__file__).parents[2]
ON_A_GPU_ONLY = ("peak_vs_dense", "device_ms", "nvjpeg", "_triton", "_4w", "_8w", "_15w")
"""What a CPU has no figure for, by parts of their names."""


def found_in(path: Path) -> dict:
    return json.loads(path.read_text())


def check(stage: str, path: Path) -> None:
    """A stage writes all figures of goals.py that a CPU can give, with their units and goals."""
    written = found_in(path)
    assert written["stage"] == stage
    assert written["notes"]["finished"] is True
    possible = [n for n in STAGES[stage] if not any(part in n for part in ON_A_GPU_ONLY)]
    assert set(possible) <= set(written["figures"])
    for name, figure in written["figures"].items():
        assert (figure["unit"], figure["goal"], figure["peer"]) == STAGES[stage][name]
        assert figure["runs"]
        assert figure["value"] == pytest.approx(sorted(figure["runs"])[len(figure["runs"]) // 2])


@pytest.mark.parametrize("stage", ["probe", "flat", "shards", "two_four"])
def test_a_stage_runs_on_a_cpu(stage: str, tmp_path: Path) -> None:
    main([stage, "--tiny", "--json", str(tmp_path / "found.json")])
    check(stage, tmp_path / "found.json")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tests", "irp", "scoring", "resnet50"])
def test_a_long_stage_runs_on_a_cpu(stage: str, tmp_path: Path) -> None:
    main([stage, "--tiny", "--json", str(tmp_path / "found.json")])
    check(stage, tmp_path / "found.json")


@pytest.mark.slow
def test_the_stage_of_deepspeed_runs_on_a_cpu(tmp_path: Path) -> None:
    """In a process of its own: it begins and ends torch.distributed."""
    path = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "deepspeed", "--tiny", "--json", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check("deepspeed", path)
    figures = found_in(path)["figures"]
    for stage in range(4):
        assert figures[f"loss_difference_zero{stage}_fp32"]["value"] < 1e-5


@pytest.mark.slow
def test_the_drill_goes_on_after_a_stage_that_fails(tmp_path: Path) -> None:
    """Without wheels and data; an unknown stage fails, and costs itself only."""
    environment = {**os.environ, "PYTHON": sys.executable, "DRILL_FLAGS": "--tiny"}
    command = ["bash", "benchmarks/gpu_drill.sh", "-", "-", str(tmp_path), "nothing", "probe"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nothing: failed (2)" in done.stdout
    assert "probe: done in" in done.stdout
    assert "copy_gb_per_s" in done.stdout.rpartition("probe: done")[2]
    assert set(found_in(tmp_path / "drill.json")["stages"]) == {"probe"}
    assert "=== probe" in (tmp_path / "drill.log").read_text()


def stage_file(path: Path, torch: str = "2.11", **figures: list[float]) -> Path:
    """Write what the stage `tests` would write, of made-up figures."""
    whole = {
        "stage": "tests",
        "machine": {"processor": "x", "cores": 2, "torch": torch, "gpus": ["Card"]},
        "figures": {
            name: {"value": sorted(runs)[len(runs) // 2], "runs": runs}
            for name, runs in figures.items()
        },
        "notes": {},
    }
    path.write_text(json.dumps(whole))
    return path


@pytest.mark.parametrize(
    ("value", "goal", "expected"),
    [(1.0, "<= 1", "yes"), (1.1, "<= 1", "no"), (0.9, ">= 0.9", "yes"), (0, "0", "yes"),
     (1, "0", "no"), (3.0, "", "")],
)  # fmt: skip
def test_goals_are_judged(value: float, goal: str, expected: str) -> None:
    assert table.met(value, goal) == expected


def test_every_goal_can_be_judged() -> None:
    for expected in STAGES.values():
        for _, goal, _ in expected.values():
            assert table.met(1.0, goal) in ("yes", "no", "")


def test_later_figures_replace_earlier_ones_of_the_same_machine(tmp_path: Path) -> None:
    one = stage_file(tmp_path / "1.json", tests_passed=[3.0], tests_failed=[2.0])
    two = stage_file(tmp_path / "2.json", tests_failed=[0.0])
    figures = table.gathered([one, two])["tests"]["figures"]
    assert {name: each["value"] for name, each in figures.items()} == {
        "tests_passed": 3.0,
        "tests_failed": 0.0,
    }
    other = stage_file(tmp_path / "3.json", torch="2.12", tests_failed=[1.0])
    assert set(table.gathered([one, other])["tests"]["figures"]) == {"tests_failed"}


def test_a_page_gets_its_table_anew(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    measured = stage_file(tmp_path / "1.json", tests_passed=[3.0, 5.0, 4.0], tests_failed=[0.0])
    table.main([str(measured), "--docs", str(page), "--quiet", "--json", str(tmp_path / "all")])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "### Stage tests\n" in text
    assert "| `tests_passed` | 4 tests | 3 to 5 |  |  |  |" in text
    assert "| `tests_failed` | 0 tests |  | 0 | yes |  |" in text
    assert "| `tests_seconds` | not yet measured |" in text
    assert "Card, 2 cores, torch 2.11" in text
    again = tmp_path / "again.md"
    again.write_text(f"{table.BEGIN}\n{table.END}")
    table.main([str(tmp_path / "all"), "--docs", str(again), "--quiet"])
    assert again.read_text() in text


def test_the_page_has_a_row_for_every_figure() -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    for stage, expected in STAGES.items():
        section = text.split(f"\n### Stage {stage}\n")[1].split("\n### ")[0]
        for name in expected:
            assert f"| `{name}` | " in section
