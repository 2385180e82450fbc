"""DeepSpeed on two gloo ranks: the same losses as masked-dense, tickets in and out, resume."""

from __future__ import annotations

import json
import os
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autosparse import prune
from autosparse.data import sets
from autosparse.data.sets import DataSource
from autosparse.sparsity.ticket import Ticket
from autosparse.study.config import DeepSpeedConfig
from tests.conftest import SMALL_DIGITS, few, make_model
from tests.integration.dtypes_on_ranks import reduced
from tests.integration.evaluations import evaluations
from tests.integration.losses_on_ranks import losses
from tests.integration.masked_dense import CASES, STEPS, reference, rounding
from tests.integration.ranks import ROOT, SCRIPT, Group, ended, launcher, started
from tests.integration.scaled_on_ranks import refused, scales
from tests.integration.slimmed_on_ranks import slimmed

FEW = 8
"""Steps of the quick trainings; under ZeRO 3 a step takes as long as ten otherwise."""
QUICK_CASES = [
    ("test_byobnet", 0, "flat", FEW), ("test_byobnet", 1, "sparse", FEW),
    ("test_byobnet", 2, "auto", FEW), ("test_vit", 1, "auto", FEW), ("test_vit", 2, "flat", FEW),
    ("test_vit", 3, "auto", FEW // 2),
]  # fmt: skip
WAYS = [(stage, how) for stage in range(4) for how in ("auto", "flat", "sparse")]
ALL_CASES = [
    (name, stage, how, STEPS)
    for name in CASES
    for stage, how in WAYS
    if (stage, how) != (3, "flat")  # Parameters are only there while their layer is at work.
]


def launch(
    script: Path, *arguments: str, ranks: int = 2, seconds: float = 240
) -> subprocess.CompletedProcess:
    """Run a script as `deepspeed --num_accelerators N` would on a machine without a GPU."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*launcher(ranks), str(script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


@cache
def expected_of(name: str, steps: int) -> tuple[Tensor, dict[str, Tensor], float, float]:
    """Return the losses and average of the reference, and how far rounding may lead from them."""
    source = sets.load(SMALL_DIGITS)
    exact = reference(name, source, ranks=2, steps=steps)
    bounds = rounding(name, source, 2, exact)
    assert max(bounds) < 1e-4, "too wide to tell anything"
    return *exact, *bounds


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "stage", "how", "steps"),
    [*QUICK_CASES, *(pytest.param(*each, marks=pytest.mark.slow) for each in ALL_CASES)],
)
def test_compact_training_equals_masked_dense_training(
    group: Group, name: str, stage: int, how: str, steps: int
) -> None:
    """With clipping, weight decay and a moving average; accumulated over two parts for one.

    The engine computes in float32, the reference in float64; the tolerance is measured.
    """
    expected, average, loss_bound, weight_bound = expected_of(name, steps)
    if steps == STEPS:
        assert float(expected[0].mean() - expected[-5:].mean()) > 0.2, "nothing was learned"
    found = group.call(losses, name, stage, how, steps, seconds=600)
    each = torch.tensor([rank[0] for rank in found], dtype=torch.float64).T
    assert each.shape == (steps, 2)
    assert float((each - expected).abs().max()) < loss_bound
    for weights in (rank[1] for rank in found):
        assert weights.keys() == (average.keys() if stage != 3 else set())
        for parameter, value in weights.items():
            distance = float((value.double() - average[parameter]).abs().max())
            assert distance < weight_bound, parameter


@pytest.mark.parametrize("stage", few([0, 1, 2, 3], [2]))
def test_slimmed_training_equals_that_of_the_whole_network(
    group: Group, digits: DataSource, tmp_path: Path, stage: int
) -> None:
    start = prune(make_model(), digits, "magnitude", 0.95)
    start.save(tmp_path / "ticket.safetensors")
    (slim, few_trained), (whole, all_trained) = (
        group.call(slimmed, tmp_path / "ticket.safetensors", tmp_path / "out", stage, slim)[0]
        for slim in (True, False)
    )
    assert few_trained < 0.85 * all_trained
    ours, theirs = Ticket.load(slim), Ticket.load(whole)
    assert ours.fingerprint == theirs.fingerprint == start.fingerprint
    for part in ("values", "rest"):
        for name, value in getattr(ours, part).items():
            moved = value != getattr(start, part)[name]
            other = getattr(theirs, part)[name]
            torch.testing.assert_close(value[moved], other[moved], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("name", "stage"), [("test_byobnet", 2), ("test_vit", 1)])
def test_scattering_all_weights_at_once_gives_the_same_bits(
    group: Group, name: str, stage: int
) -> None:
    each, flat = (group.call(losses, name, stage, how, FEW // 2) for how in ("auto", "flat"))
    assert [rank[0] for rank in flat] == [rank[0] for rank in each]


@pytest.fixture(scope="module")
def communicated(group: Group) -> dict[int, dict]:
    return {stage: group.call(reduced, stage)[0] for stage in range(4)}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_compact_gradients_are_sent_in_the_dtype_of_training(
    communicated: dict[int, dict], stage: int
) -> None:
    """Norms, biases of compact layers and embeddings go in fp32; ZeRO pads with a few entries."""
    found = communicated[stage]
    assert found["bfloat16"] >= found["values"] > 0.8 * found["all"]
    assert found["float32"] <= found["all"] - found["values"]
    assert found["all"] <= found["bfloat16"] + found["float32"] <= found["all"] + 100
    assert found["losses"] == pytest.approx(communicated[0]["losses"], abs=5e-3)


def test_without_zero_all_gradients_are_sent_in_fp32(communicated: dict[int, dict]) -> None:
    """That is DeepSpeed's way with autocast, for dense models too."""
    found = communicated[0]
    assert (found["float32"], found.get("bfloat16")) == (found["all"], None)


def test_the_loss_scale_falls_where_gradients_overflow_and_is_kept(
    group: Group, tmp_path: Path
) -> None:
    for found, skipped in group.call(scales, tmp_path):
        assert found == [2.0**59, 2.0**58, 2.0**57, 2.0**57]
        assert skipped == [3, 3]


def test_fp16_is_refused_under_zero(group: Group) -> None:
    """In DeepSpeed 0.19 a step that overflows leaves the scale as it is: all are skipped."""
    stages = [DeepSpeedConfig(stage) for stage in range(4)]
    for said in group.call(refused, "fp16", stages):
        assert [bool(each) for each in said] == [False, True, True, True]
        assert all("set deepspeed.zero_stage 0" in each for each in said[1:])


def test_settings_of_deepspeed_that_cannot_be(group: Group) -> None:
    wrong = [DeepSpeedConfig(5), DeepSpeedConfig(1, 0), DeepSpeedConfig(1, -1)]
    for said in group.call(refused, "fp32", wrong):
        assert said == [
            "deepspeed.zero_stage must be whole and at least 0 and at most 3, got 5",
            "deepspeed.gradient_accumulation must be whole and at least 1, got 0",
            "deepspeed.gradient_accumulation must be whole and at least 1, got -1",
        ]


def test_plain_pytorch_and_deepspeed_evaluate_alike(group: Group) -> None:
    """The same weights give the same results under bf16, averaged or not, and others than fp32."""
    results = {}
    for found in group.call(evaluations):
        for precision in ("fp32", "bf16"):
            (expected,) = {
                tuple(each.values())
                for ema in ("0.0", "0.5")
                for each in found[f"{precision} {ema}"]
            }
            results.setdefault(precision, set()).add(expected)
    (single,), (half,) = results["fp32"], results["bf16"]
    assert single[0] != half[0]


TINY = [
    "--data.name", "digits", "--data.train_limit", "300", "--training.batch_size", "100",
    "--training.epochs", "4", "--training.checkpoint_epochs", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def tickets(tmp_path_factory: pytest.TempPathFactory, digits) -> Path:
    folder = tmp_path_factory.mktemp("tickets")
    for criterion in ("erk", "dense"):
        prune(make_model(), digits, criterion, 0.9).save(folder / f"{criterion}.safetensors")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tickets: Path) -> Path:
    out, log = tmp_path_factory.mktemp("trained"), tmp_path_factory.mktemp("log") / "ranks"
    processes = started(_arguments(tickets, out, "--deepspeed.zero_stage", "1"), log)
    assert ended(processes, 240), "it hangs"
    said = [(log / str(rank)).read_text() for rank in range(2)]
    assert [process.exitcode for process in processes] == [0, 0], said
    assert "erk" in said[0] and "erk" not in said[1]
    return out


def _arguments(tickets: Path, out: Path, *more: str) -> list[str]:
    found = ["--tickets", f"[{tickets}/*.safetensors]", "--out", str(out)]
    return [*TINY, *found, "--tracking", "false", *more]


def _train(tickets: Path, out: Path, *more: str) -> subprocess.CompletedProcess:
    return launch(SCRIPT, *_arguments(tickets, out, *more))


def test_every_ticket_is_trained_into_its_own_folder(trained: Path, tickets: Path) -> None:
    results = {path.parent.name.split("-")[0]: path for path in trained.glob("*/result.json")}
    assert sorted(results) == ["dense", "erk"]
    start = Ticket.load(tickets / "erk.safetensors")
    end = Ticket.load(results["erk"].parent / "trained.safetensors")
    assert end.fingerprint == start.fingerprint
    assert any(not torch.equal(end.values[n], start.values[n]) for n in start.values)
    result = json.loads(results["erk"].read_text())
    assert len(result["history"]) == 4
    assert (
        result["checkpoint_bytes"]
        < 0.2 * json.loads(results["dense"].read_text())["checkpoint_bytes"]
    )
    assert not list(trained.glob("*/deepspeed"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1", "3"])
def test_a_training_cut_short_ends_as_the_unbroken_one(
    tickets: Path, tmp_path: Path, stage: str
) -> None:
    """Interrupted after epoch 3 on both ranks; resumed from epoch 2's checkpoint."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = ["--deepspeed.zero_stage", stage]
    assert _train(tickets, whole, *more).returncode == 0
    script = tmp_path / "stop.py"
    script.write_text(STOP_AFTER_THREE.format(script=str(SCRIPT)))
    cut = launch(script, *_arguments(tickets, broken, *more))
    assert cut.returncode != 0
    assert list(broken.glob("*/deepspeed/step*/checkpoint.json"))
    assert _train(tickets, broken, *more).returncode == 0
    for path in whole.glob("*/trained.safetensors"):
        expected = Ticket.load(path)
        found = Ticket.load(broken / path.relative_to(whole))
        assert found.content_hash == expected.content_hash, path


STOP_AFTER_THREE = """
import os, runpy, sys
from autosparse.integrations.deepspeed import DeepSpeedStepper
save = DeepSpeedStepper.save

def stop(self, folder, history):
    save(self, folder, history)
    self.saved = True

step = DeepSpeedStepper.step

def counted(self, images, labels):
    if getattr(self, "saved", False) and self.updates >= 9:
        os._exit(9)
    return step(self, images, labels)

DeepSpeedStepper.save, DeepSpeedStepper.step = stop, counted
sys.argv[0] = {script!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_users_mistake_is_one_line_and_the_launcher_fails(tmp_path: Path) -> None:
    done = launch(SCRIPT, "--tickets", "[nothing.safetensors]")
    assert done.returncode != 0
    assert "error: no such file: nothing.safetensors" in done.stderr
    assert not (tmp_path / "trained").exists()
