"""DeepSpeed on one GPU, ZeRO 0 to 3: the losses of the plain stepper, and what would be sent.

timm's resnet18 at 32 px, 90 %, AdamW, one rank; fp32 without TF32, by deterministic kernels of
cuDNN. One rank sends nothing to itself, so what is counted is the dtype that DeepSpeed has marked
each parameter to be communicated in, and the bytes that pass through its collectives all the same.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.comm import comm
from torch import Tensor, nn

from autosparse.integrations import deepspeed as ours
from autosparse.models.config import ModelConfig
from autosparse.models.numerics import exactly
from autosparse.sparsity.compact import MARK
from autosparse.study.config import DeepSpeedConfig, SparseTrainConfig
from autosparse.training.config import TrainingConfig
from autosparse.training.steppers import PlainStepper, Ranks
from benchmarks.gpu.goals import PRECISIONS, ZERO
from benchmarks.gpu.measure import (
    Recorder,
    Setting,
    compacted,
    dense_model,
    in_turn,
    random_batch,
)

SPARSITY, SIDE, STEPS = 0.9, 32, 5
BATCH, TINY_BATCH = 256, 4
COLLECTIVES = {
    "all_reduce": (0, "tensor"),
    "reduce": (0, "tensor"),
    "all_gather_into_tensor": (0, "output_tensor"),
    "reduce_scatter_tensor": (1, "input_tensor"),
}
"""Which of their arguments is the whole tensor, by place and by name."""


def run(setting: Setting, recorder: Recorder) -> None:
    ranks, device = ours.start()
    recorder.note("backend", f"{dist.get_backend()} on {device}")
    batch = random_batch(TINY_BATCH if setting.tiny else BATCH, SIDE, setting.device)
    config = (
        ModelConfig("test_resnet") if setting.tiny else ModelConfig("resnet18", small_stem=True)
    )
    model = dense_model(config, SIDE)
    for precision in PRECISIONS:
        training = TrainingConfig(batch_size=len(batch[0]), schedule="none", precision=precision)
        with exactly(setting.device) if precision == "fp32" else nullcontext():
            expected = losses(plain(model, training, setting), batch)
            recorder.note(f"losses_plain_{precision}", expected)
            for stage in ZERO:
                compare(stage, model, training, expected, batch, ranks, setting, recorder)
    dist.destroy_process_group()


def plain(model: nn.Module, training: TrainingConfig, setting: Setting) -> PlainStepper:
    """Return plain PyTorch's training of the ticket."""
    network = compacted(model, SPARSITY).to(setting.device).train()
    return PlainStepper(network, replace(training, sparse_products=False), 1000)


def losses(stepper: Any, batch: tuple[Tensor, Tensor]) -> list[float]:
    """Return the losses of five steps on one batch."""
    stepper.model.train()
    return [float(stepper.step(*batch)) for _ in range(STEPS)]


def compare(
    stage: int,
    model: nn.Module,
    training: TrainingConfig,
    expected: list[float],
    batch: tuple[Tensor, Tensor],
    ranks: Ranks,
    setting: Setting,
    recorder: Recorder,
) -> None:
    """Train under one ZeRO stage; record losses, bytes, dtypes and the time of a step."""
    config = SparseTrainConfig(
        training=replace(training, sparse_products=False),
        deepspeed=DeepSpeedConfig(zero_stage=stage),
    )
    network = compacted(model, SPARSITY).to(setting.device)
    stepper = ours.DeepSpeedStepper(network, config, 1000, ranks)
    with counted() as sent:
        found = losses(stepper, batch)
    name = f"zero{stage}_{training.precision}"
    off = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    recorder.note(f"losses_{name}", found)
    recorder.note(f"bytes_of_five_steps_{name}", {f"{k} {d}": n for (k, d), n in sent.items()})
    recorder.add(f"loss_difference_{name}", [off])
    if training.precision == "bf16":
        taken = in_turn({"step": lambda: stepper.step(*batch)}, setting, steps=10)
        recorder.add(f"step_ms_{name}", taken["step"])
        if stage == 1:
            recorder.add("sent_in_bf16", [share_in_bf16(network)])
    with tempfile.TemporaryDirectory() as folder:
        stepper.engine.save_checkpoint(folder, tag="one")
    stepper.close()


def share_in_bf16(network: nn.Module) -> float:
    """Return which share of the bytes of compact values DeepSpeed would send in bf16."""
    sizes: Counter[torch.dtype] = Counter()
    for name, parameter in network.named_parameters():
        if MARK in name:
            kind = getattr(parameter, "comm_dtype", parameter.dtype)
            sizes[kind] += parameter.numel() * kind.itemsize
    return sizes[torch.bfloat16] / sum(sizes.values())


@contextmanager
def counted() -> Iterator[Counter[tuple[str, str]]]:
    """Count the bytes of whole tensors that pass through DeepSpeed's collectives, by dtype."""
    found: Counter[tuple[str, str]] = Counter()
    backend = comm.cdb
    assert backend is not None
    for kind in COLLECTIVES:
        setattr(backend, kind, _counting(getattr(backend, kind), kind, found))
    yield found
    for kind in COLLECTIVES:
        delattr(backend, kind)


def _counting(call: Callable, kind: str, found: Counter[tuple[str, str]]) -> Callable:
    place, name = COLLECTIVES[kind]

    def count(*arguments: Any, **named: Any) -> Any:
        tensor = arguments[place] if len(arguments) > place else named[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        found[kind, dtype] += tensor.numel() * tensor.element_size()
        return call(*arguments, **named)

    return count
