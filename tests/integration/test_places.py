"""Which GPU a rank takes, and what DeepSpeed is told on several; no GPU and no engine is needed."""

from __future__ import annotations

import os

import pytest

from autosparse.integrations import deepspeed, deepspeed_ranks
from autosparse.study.config import DeepSpeedConfig, SparseTrainConfig
from autosparse.training.config import TrainingConfig
from autosparse.training.steppers import Ranks

OPENMPI = "OMPI_COMM_WORLD_LOCAL_RANK"


@pytest.mark.parametrize(
    ("local", "visible", "expected"), [("0", 1, "0"), ("3", 1, "0"), ("3", 4, "3"), ("5", 4, "1")]
)
@pytest.mark.parametrize("openmpi", [False, True])
def test_a_rank_takes_one_of_the_gpus_that_it_sees(
    monkeypatch: pytest.MonkeyPatch, local: str, visible: int, expected: str, openmpi: bool
) -> None:
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.delenv(OPENMPI, raising=False)
    if openmpi:
        monkeypatch.setenv(OPENMPI, local)
    assert deepspeed_ranks.own_gpu(visible) == f"cuda:{expected}"
    assert os.environ["LOCAL_RANK"] == expected
    assert os.environ.get(OPENMPI) == (expected if openmpi else None)


@pytest.mark.parametrize("name", deepspeed_ranks.LOCAL_SIZES)
def test_the_ranks_of_a_machine_share_the_cores_that_they_may_use(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for each in deepspeed_ranks.LOCAL_SIZES:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "64")
    monkeypatch.setenv(name, "4")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert deepspeed_ranks.threads() == 2
    monkeypatch.setenv(deepspeed_ranks.BOUND, "6")
    assert deepspeed_ranks.threads() == (6 if name == "WORLD_SIZE" else 2)


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize(("gpu", "ranks"), [(True, 2), (True, 1), (False, 2)])
def test_gradients_are_sent_meanwhile_on_several_gpus(
    monkeypatch: pytest.MonkeyPatch, asked: bool, gpu: bool, ranks: int
) -> None:
    monkeypatch.setattr(deepspeed, "on_gpu", lambda: gpu)
    config = SparseTrainConfig(
        training=TrainingConfig(batch_size=8), deepspeed=DeepSpeedConfig(2, overlap_comm=asked)
    )
    told = deepspeed.engine_config(config, Ranks(0, ranks))["zero_optimization"]
    assert told == {"stage": 2, **({"overlap_comm": asked} if gpu and ranks > 1 else {})}
