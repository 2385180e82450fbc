"""Topologies that move on two ranks: masked-dense RigL's losses and masks at every ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autosparse import prune
from autosparse.core.files import read_tensors
from autosparse.data.sets import DataSource
from tests.conftest import make_model
from tests.integration.masked_dense import CASES
from tests.integration.ranks import ROOT
from tests.integration.test_deepspeed import launch
from tests.integration.topologies_on_ranks import EVERY, STEPS, UPDATES, WAYS, Run, settings
from tests.training.masked_rigl import masked_rigl

RANKS = 2
WRAPPERS = ("none", "ham", "sign_in", "sparseopt")
WRAPPED = [way for way in WAYS if way.endswith(WRAPPERS)]
RIGL = [way for way in WAYS if way not in WRAPPED]
FP32 = [way for way in RIGL if "bf16" not in way]


def train(out: Path, names: list[str], ways: list[str]) -> Path:
    script = ROOT / "tests" / "integration" / "topologies_on_ranks.py"
    told = (str(out), ",".join(names), ",".join(ways))
    done = launch(script, *told, ranks=RANKS, seconds=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("few"), ["test_vit"], ["3"])


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("topologies"), list(CASES), RIGL)


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("wrapped"), ["test_vit"], WRAPPED)


def losses_of(out: Path, key: str) -> list[list[float]]:
    """Return [steps][ranks]."""
    each = [json.loads((out / f"rank{rank}.json").read_text())[key] for rank in range(RANKS)]
    return [list(both) for both in zip(*each, strict=True)]


def reference(
    name: str, source: DataSource
) -> tuple[list[list[float]], list[dict[str, Tensor]], dict[str, Tensor]]:
    """Return the losses [steps][ranks], the masks after every update, and the last weights."""
    case = CASES[name]
    model = make_model(name, **case.options)
    chosen = prune(model, source, "erk", case.sparsity).masks
    model.double().train()
    parts = RANKS * case.accumulation
    data = [
        list(zip(images.double().chunk(parts), labels.chunk(parts), strict=True))
        for images, labels in Run.batches(source)
    ]
    floats = {layer: mask.double() for layer, mask in chosen.items()}
    losses, masks = masked_rigl(model, floats, data, settings(name).training, STEPS)
    by_rank = [
        torch.tensor(each).view(RANKS, case.accumulation).mean(1).tolist() for each in losses
    ]
    return by_rank, masks, dict(model.named_parameters())


@pytest.mark.timeout(600)
def test_zero_3_does_what_masked_dense_rigl_does_and_resumes(few: Path, digits) -> None:
    same_as_reference(few, "test_vit", ["3"], digits)
    assert losses_of(few, "resumed 3") == losses_of(few, "test_vit 3")[4:]


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("name", list(CASES))
def test_every_stage_does_what_masked_dense_rigl_does(
    trainings: Path, name: str, digits: DataSource
) -> None:
    same_as_reference(trainings, name, FP32, digits)


def same_as_reference(trainings: Path, name: str, ways: list[str], digits: DataSource) -> None:
    """The engine computes in float32, the reference in float64."""
    losses, masks, weights = reference(name, digits)
    for way in ways:
        found = losses_of(trainings, f"{name} {way}")
        assert len(found) == STEPS
        for mine, expected in zip(found, losses, strict=True):
            assert mine == pytest.approx(expected, abs=1e-5), way
        for update in range(UPDATES):
            now, _ = read_tensors(trainings / f"{name} {way} {update}.safetensors")
            assert len(now) > 5
            for layer, mask in now.items():
                assert torch.equal(mask, masks[update][layer]), (way, update, layer)
        values, _ = read_tensors(trainings / f"{name} {way} values.safetensors")
        for layer in now:
            path, _, attribute = layer.rpartition(".")
            mine = values[f"{path}.parametrizations.{attribute}.original"]
            expected = weights[layer].detach()[masks[-1][layer]]
            torch.testing.assert_close(mine.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("name", list(CASES))
def test_moments_follow_wherever_they_are_kept(trainings: Path, name: str) -> None:
    """Without ZeRO they are the optimizer's own, whole; with it, all ranks' shares."""
    expected, _ = read_tensors(trainings / f"{name} 0 moments.safetensors")
    assert len(expected) > 15
    for way in ("1", "2", "3"):
        found, _ = read_tensors(trainings / f"{name} {way} moments.safetensors")
        assert found.keys() == expected.keys()
        for key, moment in expected.items():
            torch.testing.assert_close(found[key], moment, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("name", list(CASES))
def test_bf16_exchanges_too(trainings: Path, name: str) -> None:
    exact, found = (losses_of(trainings, f"{name} {way}") for way in ("1", "1 bf16"))
    for mine, expected in zip(found, exact, strict=True):
        assert mine == pytest.approx(expected, abs=0.05)
    first, _ = read_tensors(trainings / f"{name} 1 bf16 0.safetensors")
    last, _ = read_tensors(trainings / f"{name} 1 bf16 {UPDATES - 1}.safetensors")
    assert all(int(first[layer].sum()) == int(mask.sum()) for layer, mask in last.items())
    assert any(not torch.equal(first[layer], mask) for layer, mask in last.items())


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("stage", range(4))
def test_a_resume_between_updates_is_equal_in_every_bit(trainings: Path, stage: int) -> None:
    """From after step 4, one step past the first update."""
    assert 4 % EVERY == 1
    whole = losses_of(trainings, f"test_vit {stage}")
    assert losses_of(trainings, f"resumed {stage}") == whole[4:]


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_optimizer_wrappers_do_the_same_at_every_stage(wrapped: Path) -> None:
    """With SET; clipped, and accumulated over two parts."""
    plain = losses_of(wrapped, "test_vit 0 none")
    for wrapper in WRAPPERS:
        expected = losses_of(wrapped, f"test_vit 0 {wrapper}")
        assert (expected == plain) is (wrapper == "none")
        for stage in (1, 2, 3):
            found = losses_of(wrapped, f"test_vit {stage} {wrapper}")
            for mine, other in zip(found, expected, strict=True):
                assert mine == pytest.approx(other, abs=1e-5), (stage, wrapper)
