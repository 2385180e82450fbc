"""Pruning together on two gloo ranks: one ticket everywhere, the scores of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import autosparse
from autosparse import criteria
from autosparse.autos.network import AutoS
from autosparse.core.files import write_json
from autosparse.study.cells import RESULT, cells
from tests.integration.cells_on_ranks import configs
from tests.integration.prune_on_ranks import CASES, WORLD, scores_of

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(autosparse.__file__).parent.parent
SCRIPT = ROOT / "tests" / "integration" / "prune_on_ranks.py"


def launch(out: Path, *arguments: str, script: Path = SCRIPT) -> list[tuple[int, str]]:
    """Run the script on every rank; return exit codes and what was said on stderr."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [str(out / "store"), str(out), *arguments]
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), *command],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, text) for process, text in zip(running, said, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    AutoS("context").save(out / "autos.safetensors")
    for code, said in launch(out, str(out / "autos.safetensors")):
        assert code == 0, said[-3000:]
    return out


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def scores(folder: Path) -> list[dict[str, tuple[dict[str, Tensor], float]]]:
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("criterion", [*criteria.names(), "own batches"])
def test_every_rank_has_the_same_ticket(found: list[dict], criterion: str) -> None:
    first, second = (each["tickets"][criterion] for each in found)
    assert first == second


def test_criteria_do_not_all_have_the_same_ticket(found: list[dict]) -> None:
    assert len(set(found[0]["tickets"].values())) == len(criteria.names()) + 1


@pytest.mark.parametrize(
    ("criterion", "scoring"),
    [pytest.param(*case, id=" ".join(case)) for case in CASES],
)
def test_scores_are_those_of_one_process(scores: list[dict], criterion: str, scoring: str) -> None:
    first, second = (each[f"{criterion} {scoring}"][0] for each in scores)
    expected = scores_of(criterion, scoring)[0]
    assert list(first) == list(expected)
    for name, score in expected.items():
        assert torch.equal(first[name], second[name])
        tolerance = 1e-4 * float(score.abs().max())
        torch.testing.assert_close(first[name], score, rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize(
    ("criterion", "scoring"),
    [
        ("snip", "one batch"),
        ("fisher", "one batch"),
        ("iter_snip", "one batch"),
        ("snip", "warm, even"),
    ],
)
def test_the_cost_is_that_of_all_ranks(scores: list[dict], criterion: str, scoring: str) -> None:
    first, second = (each[f"{criterion} {scoring}"][1] for each in scores)
    assert first == second == scores_of(criterion, scoring)[1]


@pytest.mark.parametrize(
    "criterion",
    ["magnitude", "snip"],
)
def test_another_model_on_a_rank_fails_on_every_rank(found: list[dict], criterion: str) -> None:
    for each in found:
        assert each["failures"][criterion].startswith("RunFailed: rank 1")
        assert "same model" in each["failures"][criterion]


@pytest.mark.slow
def test_another_kind_of_model_on_a_rank_fails_on_every_rank(tmp_path: Path) -> None:
    done = launch(tmp_path)
    assert [code for code, _ in done] == [0, 0]
    for rank in range(WORLD):
        assert (tmp_path / f"rank{rank}.txt").read_text().startswith("RunFailed")


def test_ranks_are_told_what_the_first_one_finds_on_its_disk(tmp_path: Path) -> None:
    """Of ticket and result: on a file system that lags, or belongs to a node, others find none."""
    disk = tmp_path / "disk0"
    (cell,) = cells(configs(disk)["pruned"])
    (named,) = cells(configs(disk)["tickets"])
    for each in (cell, named):
        write_json(each.folder / RESULT, {"name": each.name})
    for code, said in launch(tmp_path, script=SCRIPT.with_name("cells_on_ranks.py")):
        assert code == 0, said[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["pruned"] == [str(cell.folder), cell.ticket.content_hash, {"name": cell.name}]
    assert first["tickets"][0] == str(named.folder)
    assert "no ticket matches" in first["error"] and "disk1" in first["error"]
    assert not (tmp_path / "disk1").exists()
