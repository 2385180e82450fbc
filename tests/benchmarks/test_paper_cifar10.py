"""The paper's setting in small: pieces are found again, and time that is over stops it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm

from autosparse.cli.arguments import parse
from autosparse.core.errors import UsageError
from autosparse.data.config import DataConfig
from autosparse.irp import run as irp
from autosparse.irp.config import CorpusConfig
from autosparse.irp.levels import COMPACT, MASKED
from benchmarks import paper_cifar10
from benchmarks.paper_cifar10 import Clock, PaperConfig, Study, do, nearest, rows, table

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = """
model: {name: test_byobnet}
others: [{name: test_resnet}]
data: {name: digits, train_limit: 300, augment: shift}
training: {epochs: 1, batch_size: 100, checkpoint_epochs: 0, optimizer: nesterov}
irp: {levels: 2, final_density: 0.1}
scorers:
  paper: {features: paper, holdout: 0, rows_per_run: 2000, epochs: 2}
  ours: {features: context, head: survival, hidden: [8], holdout: 0, rows_per_run: 2000, epochs: 2}
criteria: [paper, ours, snip, erk, irp]
sparsities: [0.9]
"""


def test_the_study_is_as_it_is_told() -> None:
    arguments = ["--config", str(CONFIGS / "study" / "paper_cifar10.yaml")]
    config = parse(PaperConfig, arguments, "paper", None)
    paper_cifar10.check(config)
    planned = list(rows(config))
    assert len(planned) == 1 + 3 * 8 + 1 + 3 * 7
    assert {row.model.name for row in planned} == {"resnet18", "vgg16_bn"}
    assert not any(row.criterion == "irp" for row in planned if row.model.name == "vgg16_bn")
    run = Study(config, Path("out"), "cpu", Clock(0)).irp_config()
    irp.check(run)
    assert (run.levels, run.training) == (8, config.training)


def test_the_larger_corpus_can_be_planned() -> None:
    arguments = ["--config", str(CONFIGS / "corpus" / "cifar10_gpu.yaml")]
    config = parse(CorpusConfig, arguments, "corpus", None)
    assert len(config.data) == 2
    runs = replace(config, data=[DataConfig()]).runs()  # Own data would have to be there.
    assert len(runs) == 4 * 2 * 2
    assert {timm.is_model(run.model.name) for run in runs} == {True}
    for run in runs:
        irp.check(run)
        assert run.device == "cuda"


def test_a_criterion_that_is_none_is_named() -> None:
    with pytest.raises(UsageError, match="snib"):
        paper_cifar10.check(PaperConfig(criteria=["snib"]))


def test_the_nearest_density_is_nearest_as_a_ratio() -> None:
    assert nearest([1.0, 0.1, 0.02], 0.04) == 2
    assert nearest([1.0, 0.1, 0.02], 0.05) == 1


def test_the_table_has_a_column_per_sparsity() -> None:
    place = {"model": "m", "seed": 1}
    found = [
        {**place, "criterion": "dense", "sparsity": 0.0, "test_accuracy": 0.9},
        {**place, "criterion": "snip", "sparsity": 0.95, "test_accuracy": 0.8},
        {**place, "criterion": "snip", "sparsity": 0.98, "test_accuracy": 0.71234},
    ]
    assert table(found) == [
        {**place, "criterion": "dense", "at 0%": "90.00%", "at 95%": "", "at 98%": ""},
        {**place, "criterion": "snip", "at 0%": "", "at 95%": "80.00%", "at 98%": "71.23%"},
    ]


def run_small(folder: Path, *more: str) -> list[dict]:
    (folder / "small.yaml").write_text(SMALL)
    places = ["--config", str(folder / "small.yaml"), "--out", str(folder / "out")]
    paper_cifar10.main([*places, "--json", str(folder / "found.json"), "--device", "cpu", *more])
    return json.loads((folder / "found.json").read_text())["rows"]


def test_no_time_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_small(tmp_path, "--minutes", "0") == []
    assert "the time is over; the same command goes on from here" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


class Steps(Clock):
    """Time that is over after some looks at it."""

    def over(self, needed: float = 0.0) -> bool:
        self.seconds -= 1
        return self.seconds < 0


@pytest.mark.slow
@pytest.mark.parametrize("way", [MASKED, COMPACT])
def test_pieces_add_up_and_are_found_again(tmp_path: Path, monkeypatch, way: str) -> None:
    for module in (irp, paper_cifar10):
        monkeypatch.setattr(module, "way_for", lambda *_: way)
    (tmp_path / "small.yaml").write_text(SMALL)
    config = parse(PaperConfig, ["--config", str(tmp_path / "small.yaml")], "paper", None)
    seen, finished = [], False
    for looks in range(2, 40, 6):
        study = Study(config, tmp_path / "out", "cpu", Steps(looks))
        found, finished = do(study, lambda _: None)
        seen.append(len(found))
        if finished:
            break
    assert finished and seen == sorted(seen) and len(seen) > 2
    trained = sorted((tmp_path / "out" / "trained").glob("*/result.json"))
    assert len(trained) == len(list(rows(config))) == 1 + 5 + 1 + 4
    before = {path: path.stat().st_mtime_ns for path in trained}
    assert run_small(tmp_path, "--minutes", "0") == found
    assert {path: path.stat().st_mtime_ns for path in trained} == before
    assert {row["criterion"] for row in found} == {"dense", "paper", "ours", "snip", "erk", "irp"}
    assert all(0 < row["test_accuracy"] <= 1 for row in found)
