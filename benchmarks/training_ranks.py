"""What benchmarks.training runs on every rank: `training_ranks.py OUT [memory SPARSITY WAY]`."""

from __future__ import annotations

import ctypes
import gc
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.comm.torch import TorchBackend
from timm import create_model
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from autosparse.core.memory import keep_freed_blocks
from autosparse.integrations import deepspeed as ours
from autosparse.models import zoo
from autosparse.sparsity import masks
from autosparse.sparsity.ticket import Ticket, compact
from autosparse.study.config import DeepSpeedConfig, SparseTrainConfig
from autosparse.training.config import TrainingConfig
from autosparse.training.steppers import History, Ranks
from benchmarks.masked_rigl import MaskedRigL

SIDE, BATCH, STEPS, TURNS = 32, 32, 4, 9
"""Pixels, images per rank, steps per measurement, measurements of each."""
SPARSITIES = (0.0, 0.9, 0.95, 0.98, 0.99)
BARE, MASKED, RESCATTER = "bare", "masked", "rescatter"
RIGL, MASKED_RIGL = "rigl", "masked rigl"
"""One of the STEPS steps of a measurement ends with an exchange."""
FRACTION = 0.3


def make_model(name: str = "resnet18") -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, pretrained=False, num_classes=10)


def random_masks(model: nn.Module, sparsity: float) -> masks.Masks:
    """Return masks of random weights, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    weights = zoo.prunable(model).items()
    scores = {name: torch.rand(weight.shape, generator=generator) for name, weight in weights}
    return masks.from_scores(scores, sparsity)


def settings(ranks: Ranks, **changes: Any) -> SparseTrainConfig:
    training = TrainingConfig(batch_size=BATCH * ranks.world_size, schedule="none", **changes)
    return SparseTrainConfig(training=training, deepspeed=DeepSpeedConfig(zero_stage=1))


def make_stepper(
    sparsity: float, ranks: Ranks, name: str = "resnet18", **changes: Any
) -> ours.DeepSpeedStepper:
    """Return our training of a ticket; of the dense model at 0."""
    model = make_model(name)
    if sparsity:
        compact(model, Ticket.from_model(model, random_masks(model, sparsity), {}))
    return ours.DeepSpeedStepper(model, settings(ranks, **changes), 1000, ranks)


def make_bare(ranks: Ranks, sparsity: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the step of a plain DeepSpeed loop; with masks, of torch.nn.utils.prune's."""
    model = make_model()
    for name, mask in random_masks(model, sparsity).items() if sparsity else ():
        path, _, attribute = name.rpartition(".")
        torch_prune.custom_from_mask(model.get_submodule(path), attribute, mask)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    config = ours.engine_config(settings(ranks), ranks)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    loss_fn = nn.CrossEntropyLoss()

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = loss_fn(engine(images), labels)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    engine.train()
    return step


def make_masked_rigl(ranks: Ranks, sparsity: float = 0.98) -> MaskedRigL:
    """Return RigL over masked-dense weights, in a plain DeepSpeed loop."""
    model = make_model()
    config = ours.engine_config(settings(ranks), ranks)
    return MaskedRigL(model, random_masks(model, sparsity), config, STEPS, FRACTION)


@contextmanager
def counting_bytes() -> Iterator[Counter]:
    """Count the bytes that are handed to the backend's reductions of floats."""
    counted: Counter = Counter()
    names = (
        "all_reduce",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_tensor",
        "coalesced_all_reduce",
    )
    before = {name: getattr(TorchBackend, name) for name in names if hasattr(TorchBackend, name)}

    def counted_call(name: str) -> Callable:
        def call(self: Any, tensor: Any, *arguments: Any, **options: Any) -> Any:
            for each in tensor if isinstance(tensor, list | tuple) else [tensor]:
                if each.is_floating_point():
                    counted["bytes"] += each.numel() * each.element_size()
            return before[name](self, tensor, *arguments, **options)

        return call

    for name in before:
        setattr(TorchBackend, name, counted_call(name))
    try:
        yield counted
    finally:
        for name, function in before.items():
            setattr(TorchBackend, name, function)


def optimizer_bytes(stepper: ours.DeepSpeedStepper) -> int:
    """Return the bytes of this rank's optimizer state."""
    states = stepper.engine.optimizer.optimizer.state.values()
    tensors = [t for state in states for t in state.values() if torch.is_tensor(t)]
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(out: Path) -> dict[str, Any]:
    """Time all trainings in turn, and count what they send, hold and write."""
    ranks, _ = ours.start()
    keep_freed_blocks()  # As fit does, for whoever trains in this process.
    images, labels = torch.randn(BATCH, 3, SIDE, SIDE), torch.arange(BATCH) % 10
    steppers = {f"{sparsity:g}": make_stepper(sparsity, ranks) for sparsity in SPARSITIES}
    steps: dict[str, Callable] = {name: each.step for name, each in steppers.items()}
    again = make_stepper(0.98, ranks, rescatter=True)
    moving = make_stepper(0.98, ranks, topology="rigl", topology_every=STEPS)
    steps |= {BARE: make_bare(ranks), MASKED: make_bare(ranks, 0.98), RESCATTER: again.step}
    steps |= {RIGL: moving.step, MASKED_RIGL: make_masked_rigl(ranks).step}
    for stepper in (*steppers.values(), again, moving):
        stepper.model.train()
    sent = {}
    for name, step in steps.items():
        step(images, labels)
        with counting_bytes() as counted:
            step(images, labels)
        sent[name] = counted["bytes"]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(TURNS):
        for name in random.Random(turn).sample(list(steps), len(steps)):
            dist.barrier()
            started = time.perf_counter()
            for _ in range(STEPS):
                steps[name](images, labels)
            dist.barrier()
            seconds[name].append((time.perf_counter() - started) / STEPS)
    written = {}
    for name, stepper in steppers.items():
        folder = out / "checkpoints" / name
        stepper.save(folder, History())
        files = [p for p in (folder / "deepspeed").glob("step*/**/*") if p.is_file()]
        written[name] = sum(p.stat().st_size for p in files)
    prunable = sum(weight.numel() for weight in zoo.prunable(make_model()).values())
    return {
        "seconds": seconds,
        "steps": STEPS,
        "sent": sent,
        "optimizer": {name: optimizer_bytes(each) for name, each in steppers.items()},
        "written": written,
        "prunable": prunable,
        "other": sum(p.numel() for p in make_model().parameters()) - prunable,
    }


WAYS: dict[str, dict[str, Any]] = {
    "keep": {},
    "rescatter": {"rescatter": True},
    "rigl": {"topology": "rigl", "topology_every": 100},
    "update": {"topology": "rigl", "topology_every": 2},
}
"""How memory is measured; `update`: one of the three steps ends with an exchange."""


def measure_memory(sparsity: float, changes: dict[str, Any]) -> dict[str, Any]:
    """Return by how many bytes memory rises from before the model to the peak of three steps.

    Two tiny images per rank, so that next to nothing of it is activations; a tiny model is
    trained first, which loads the libraries. The C library is told to return blocks at once, so
    that the peak is that of tensors.
    """
    library = ctypes.CDLL("libc.so.6")
    library.mallopt(-3, 1 << 16)
    ranks, _ = ours.start()
    images, labels = torch.randn(2, 3, SIDE, SIDE), torch.arange(2)
    three_steps(make_stepper(sparsity, ranks, "test_resnet", **changes), images, labels)
    gc.collect()
    library.malloc_trim(0)
    before = _status("VmRSS")
    stepper = make_stepper(sparsity, ranks, **changes)
    gc.collect()
    library.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    started = _status("VmRSS")
    three_steps(stepper, images, labels)
    return {"peak": _status("VmHWM") - before, "start": started - before}


def three_steps(stepper: ours.DeepSpeedStepper, images: Tensor, labels: Tensor) -> None:
    stepper.model.train()
    for _ in range(3):
        stepper.step(images, labels)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def main(arguments: list[str]) -> None:
    out = Path(arguments[0])
    if arguments[1:2] == ["memory"]:
        found = measure_memory(float(arguments[2]), WAYS[arguments[3]])
        name = f"memory-{arguments[2]}-{arguments[3]}"
    else:
        found, name = measure(out), "measured"
    if dist.get_rank() == 0:
        (out / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main([each for each in sys.argv[1:] if not each.startswith("--local_rank")])
