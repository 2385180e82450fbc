"""DeepSpeed on two gloo ranks: the same losses as masked-dense, tickets in and out, resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autosparse import prune
from autosparse.core.files import read_tensors
from autosparse.sparsity.ticket import Ticket
from tests.conftest import make_model
from tests.integration.masked_dense import CASES, STEPS, reference, rounding
from tests.integration.ranks import ROOT, launcher


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


@pytest.fixture(scope="module")
def compact_trainings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("losses")
    script = ROOT / "tests" / "integration" / "losses_on_ranks.py"
    done = launch(script, str(out), seconds=800)  # Two models, eight trainings each.
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", list(CASES))
def test_compact_training_equals_masked_dense_training(
    compact_trainings: Path, name: str, digits
) -> None:
    """With clipping, weight decay and a moving average; accumulated over two parts for one.

    The engine computes in float32, the reference in float64; the tolerance is measured.
    """
    exact = expected, average = reference(name, digits, ranks=2)
    loss_bound, weight_bound = rounding(name, digits, 2, exact)
    assert max(loss_bound, weight_bound) < 1e-4, "too wide to tell anything"
    losses = [json.loads((compact_trainings / f"rank{r}.json").read_text()) for r in range(2)]
    assert float(expected[0].mean() - expected[-5:].mean()) > 0.2, "nothing was learned"
    for stage in ("0", "1", "2", "3", "1 sparse"):
        each = [losses[rank][f"{name} {stage}"] for rank in range(2)]
        found = torch.tensor(each, dtype=torch.float64).T
        assert found.shape == (STEPS, 2)
        assert float((found - expected).abs().max()) < loss_bound, f"ZeRO {stage}"
        if stage != "3":
            weights, _ = read_tensors(compact_trainings / f"{name} {stage}.safetensors")
            assert weights.keys() == average.keys()
            for parameter, wanted in average.items():
                distance = float((weights[parameter].double() - wanted).abs().max())
                assert distance < weight_bound, f"ZeRO {stage}: {parameter}"
        flat = [losses[rank].get(f"{name} {stage} flat", []) for rank in range(2)]
        assert [len(some) > 1 for some in flat] == [stage in ("0", "1", "2")] * 2
        assert flat == [whole[: len(some)] for whole, some in zip(each, flat, strict=True)]


@pytest.fixture(scope="module")
def communicated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("communicated") / "bytes.json"
    done = launch(ROOT / "tests" / "integration" / "dtypes_on_ranks.py", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_compact_gradients_are_sent_in_the_dtype_of_training(
    communicated: dict[str, dict], stage: str
) -> None:
    """Norms, biases of compact layers and embeddings go in fp32; ZeRO pads with a few entries."""
    found = communicated[stage]
    assert found["bfloat16"] >= found["values"] > 0.8 * found["all"]
    assert found["float32"] <= found["all"] - found["values"]
    assert found["all"] <= found["bfloat16"] + found["float32"] <= found["all"] + 100
    assert found["losses"] == pytest.approx(communicated["0"]["losses"], abs=5e-3)


def test_without_zero_all_gradients_are_sent_in_fp32(communicated: dict[str, dict]) -> None:
    """That is DeepSpeed's way with autocast, for dense models too."""
    found = communicated["0"]
    assert (found["float32"], found.get("bfloat16")) == (found["all"], None)


def test_plain_pytorch_and_deepspeed_evaluate_alike(tmp_path: Path) -> None:
    """The same weights give the same results under bf16, averaged or not, and others than fp32."""
    out = tmp_path / "found.json"
    script = ROOT / "tests" / "integration" / "evaluations.py"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    for precision in ("fp32", "bf16"):
        (expected,) = {
            tuple(each.values()) for ema in ("0.0", "0.5") for each in found[f"{precision} {ema}"]
        }
        found[precision] = expected
    assert found["fp32"][0] != found["bf16"][0]


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
    out = tmp_path_factory.mktemp("trained")
    done = _train(tickets, out, "--deepspeed.zero_stage", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "erk" in done.stdout
    return out


def _train(tickets: Path, out: Path, *more: str) -> subprocess.CompletedProcess:
    arguments = [*TINY, "--tickets", f"[{tickets}/*.safetensors]", "--out", str(out), *more]
    return launch(ROOT / "launch" / "train_sparse.py", *arguments, "--tracking", "false")


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
    script.write_text(STOP_AFTER_THREE.format(script=str(ROOT / "launch" / "train_sparse.py")))
    arguments = [*TINY, "--tickets", f"[{tickets}/*.safetensors]", "--out", str(broken), *more]
    cut = launch(script, *arguments, "--tracking", "false")
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
    done = launch(ROOT / "launch" / "train_sparse.py", "--tickets", "[nothing.safetensors]")
    assert done.returncode != 0
    assert "error: no such file: nothing.safetensors" in done.stderr
    assert not (tmp_path / "trained").exists()
