"""A corpus that is to be grown: which runs, in what order, and what they cost."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import autosparse
from autosparse.cli import main
from autosparse.core.errors import UsageError
from autosparse.core.files import read_card
from autosparse.corpus import store
from autosparse.data.config import DataConfig
from autosparse.irp import plan
from autosparse.irp import run as irp
from autosparse.irp.config import CorpusConfig, IRPConfig
from autosparse.models import zoo
from autosparse.models.config import ModelConfig
from autosparse.training.config import TrainingConfig
from tests.conftest import QUICK, SMALL_DIGITS, quick_irp

ROOT = Path(autosparse.__file__).parent.parent
TINY = CorpusConfig(
    models=[ModelConfig("test_byobnet")],
    data=[SMALL_DIGITS],
    training=QUICK,
    levels=1,
    final_density=0.1,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Stop(Exception):
    pass


def do(run: IRPConfig, levels: int) -> Path:
    """Do so many levels of a run, and stop."""

    def stop(entry: dict) -> None:
        if entry["level"] == levels - 1:
            raise Stop

    with pytest.raises(Stop):
        irp.run_irp(run, on_level=stop)
    return irp.run_folder(run)


# runs


def test_runs_are_named_as_their_folders(tmp_path: Path) -> None:
    found = plan.runs(replace(TINY, seeds=[1, 0], labels=["snip", "magnitude"]), tmp_path)
    assert [(run.seed, run.label) for run in found.values()] == [
        (1, "snip"), (1, "magnitude"), (0, "snip"), (0, "magnitude"),
    ]  # fmt: skip
    for name, run in found.items():
        assert irp.run_folder(run) == tmp_path / name


def test_a_run_that_is_planned_twice_is_done_once(tmp_path: Path) -> None:
    assert len(plan.runs(replace(TINY, seeds=[0, 1, 0], schedules=[{}, {"levels": 1}]), "x")) == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"labels": ["snop"]}, "'snip'"),
        ({"schedules": [{"levels": 0}]}, "levels must be whole and at least 1 and at most 255"),
    ],
)
def test_a_wrong_run_is_refused_before_any_begins(changes: dict, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        plan.runs(replace(TINY, **changes), "x")


def test_levels_done_counts_finished_levels(tmp_path: Path) -> None:
    run = quick_irp(str(tmp_path))
    folder = irp.run_folder(run)
    assert plan.levels_done(folder, run) == 0
    do(run, 2)
    assert plan.levels_done(folder, run) == 2
    irp.run_irp(run)
    assert plan.levels_done(folder, run) == 3


# order


def multiplications(model: nn.Module, size: int) -> int:
    """Twice the multiply-adds of every conv and linear layer, by their textbook formulas."""
    total = 0

    def count(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            window = layer.kernel_size[0] * layer.kernel_size[1]
            total += 2 * output.numel() * window * layer.in_channels // layer.groups
        elif isinstance(layer, nn.Linear):
            total += 2 * output.numel() * layer.in_features

    for layer in model.modules():
        layer.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    return total


@pytest.mark.parametrize("name", ["test_byobnet", "test_resnet", "test_mambaout"])
def test_operations_are_those_of_the_layers(name: str) -> None:
    shape = plan.Shape(10, 3, 32)
    model = zoo.create_for(shape, ModelConfig(name), 0)
    assert plan.operations(name, "{}", shape) == multiplications(model, 32)


def test_the_largest_runs_come_first() -> None:
    """By images x epochs x levels x operations; the smallest has a fifth of the next one's."""
    small = IRPConfig(model=ModelConfig("test_byobnet"), data=SMALL_DIGITS, training=QUICK)
    runs = {
        "small": small,
        "resnet18": replace(small, model=ModelConfig("resnet18")),
        "epochs": replace(small, training=TrainingConfig(epochs=5, batch_size=100)),
        "levels": replace(small, levels=100),
        "images": replace(small, data=DataConfig(train_limit=900)),
        "steps": replace(small, steps_per_level=300),
    }
    # In units of one training of the small model: 7 levels; 7 * 25 times the operations;
    # 7 * 5 epochs; 101 levels; 7 * 3 times the images; 7 * 300 steps of 100 images for 300.
    assert plan.largest_first(runs) == ["steps", "resnet18", "levels", "epochs", "images", "small"]


def test_images_have_the_size_of_their_set(tmp_path: Path) -> None:
    """Those of a folder 224 pixels, digits 16."""
    digits = quick_irp("x", model=ModelConfig("resnet18"))
    data = DataConfig("folder", str(tmp_path), train_limit=SMALL_DIGITS.train_limit)
    runs = {"digits": digits, "folder": replace(digits, data=data)}
    assert plan.largest_first(runs) == ["folder", "digits"]


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig("no_such_model"),
        ModelConfig("test_byobnet", {"no_such_option": 1}),
        ModelConfig("inception_v3"),  # Too small an image for it.
    ],
    ids=lambda model: model.name,
)
def test_a_model_that_cannot_run_comes_last(model: ModelConfig) -> None:
    good = quick_irp("x")
    runs = {"bad": replace(good, model=model), "good": good}
    assert plan.largest_first(runs) == ["good", "bad"]


def test_options_may_be_nested() -> None:
    options = {"block_args": {"a": [1, 2]}, "drop_rate": 0.1}
    run = quick_irp("x", model=ModelConfig("test_byobnet", options))
    assert plan.largest_first({"one": run}) == ["one"]


# table


def size_without_header(path: Path) -> int:
    content = path.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


@pytest.mark.parametrize(
    "changes", [{}, {"store_initial": False}, {"store_initial": False, "rewind_steps": 1}]
)
def test_bytes_are_what_a_run_takes(tmp_path: Path, changes: dict) -> None:
    config = replace(TINY, **changes)
    (row,) = plan.table(config, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert (row["levels"], row["measured"]) == ("0/2", "probe")
    assert row["seconds"] > 0
    (run,) = plan.runs(config, tmp_path).values()
    folder = irp.run_irp(run)
    assert row["run_id"] == folder.name
    assert row["bytes"] == size_without_header(folder / store.RUN)
    assert row["weights"] == sum(t.numel() for t in store.read_run(folder).survival.values())


def test_the_rest_is_estimated_from_what_the_corpus_holds(tmp_path: Path) -> None:
    config = replace(TINY, seeds=[0, 1, 2])
    runs = list(plan.runs(config, tmp_path).values())
    finished, half = irp.run_irp(runs[0]), do(runs[1], 1)
    levels = store.read_run(finished).card["levels"]
    levels += [read_card(path) for path in half.glob("levels/*/*.safetensors")]
    per_image = sum(level["seconds"] for level in levels) / 900
    rows = plan.table(config, tmp_path)
    assert [row["levels"] for row in rows] == ["2/2", "1/2", "0/2"]
    assert {row["measured"] for row in rows} == {"corpus"}
    # A level is three steps of 100 images.
    assert [row["seconds"] for row in rows] == [
        0, pytest.approx(300 * per_image), pytest.approx(600 * per_image),
    ]  # fmt: skip


def test_constants_of_the_normalisation_may_be_given(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from autosparse.integrations import ray

    data = replace(SMALL_DIGITS, normalisation=[0.5, 0.5])
    config = replace(TINY, data=[data], seeds=[0, 1])
    rows = plan.table(config, tmp_path)
    assert [row["levels"] for row in rows] == ["0/2", "0/2"]
    runs = plan.runs(config, tmp_path)
    ray._check_found(runs, ray.Grown(tmp_path, found=list(runs)))


def test_a_plan_of_a_remote_corpus(remote: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autosparse.core.locks.SETTLE", 0.01)
    (run,) = plan.runs(replace(TINY, levels=2), str(remote)).values()
    do(run, 2)
    (row,) = plan.table(replace(TINY, levels=2), str(remote))
    assert (row["levels"], row["measured"]) == ("2/3", "corpus")


def test_the_summary_adds_up() -> None:
    rows = [
        {"seconds": 0, "bytes": 1_500_000},
        {"seconds": 5400, "bytes": 2_000_000},
        {"seconds": 1800, "bytes": 0},
    ]
    said = plan.summary(rows, replace(TINY, cpus_per_run=2))
    assert said.startswith("3 runs, 1 finished, 2 to do: about 4.00 CPU hours, about ")
    assert said.endswith(" min on this machine; 3.5 MB on disk in all")
    said = plan.summary(rows, replace(TINY, gpus_per_run=0.25))
    assert said == "3 runs, 1 finished, 2 to do: about 0.50 GPU hours; 3.5 MB on disk in all"


def test_rows_are_shortened_for_the_terminal() -> None:
    row = {"run_id": "r", "levels": "1/2", "seconds": 90, "bytes": 1_234_567, "measured": "probe"}
    assert plan.shown(row) == {
        "run_id": "r", "levels": "1/2", "measured": "probe", "minutes left": "1.5", "MB": "1.23",
    }  # fmt: skip


# grow_corpus.py --dry-run


def test_a_dry_run_prints_the_plan_and_does_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    ray = pytest.importorskip("ray")
    before = ray.is_initialized()
    spec = importlib.util.spec_from_file_location("grow", ROOT / "ray_jobs" / "grow_corpus.py")
    assert spec is not None and spec.loader is not None
    grow = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grow)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    (tmp_path / "plan.yaml").write_text(
        "models: [{name: test_byobnet}, {name: test_resnet}]\n"
        "data: [{name: digits, train_limit: 300}]\n"
        "seeds: [0, 1]\ntraining: {epochs: 1, batch_size: 100}\nlevels: 1\n"
        "exclude: [{model: test_res*, seed: 1}]\nout: grown\n"
    )
    command = ["--dry-run", "--config", "plan.yaml"]
    assert main.guarded(grow.main, command) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.count("test_byobnet") == 2
    assert said.out.count("test_resnet") == 1
    assert said.out.count("0/2") == 3
    assert "3 runs, 0 finished, 3 to do: about " in said.out
    assert main.guarded(grow.main, [*command, "--labels", "[snop]"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert ray.is_initialized() == before
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]
