"""What `benchmarks.scale` runs on every rank: measure steps, bytes and collectives under DeepSpeed.

    RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 DS_ACCELERATOR=cpu \\
        python -m benchmarks.scale_ranks FOLDER ROUNDS

timm's resnet18 at 32 px, fp32, AdamW, 32 images and one thread per rank, random masks of the same
density in every layer. Every rank writes FOLDER/rankN.json.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import timm
import torch
import torch.distributed as dist
from deepspeed.comm import comm
from torch import Tensor, nn

from autosparse.core.files import write_json
from autosparse.integrations.deepspeed import engine_config
from autosparse.models.zoo import prunable
from autosparse.sparsity.compact import compact_weights
from autosparse.sparsity.counts import keep_count
from autosparse.sparsity.ticket import Ticket, compact
from autosparse.study.config import DeepSpeedConfig, SparseTrainConfig
from autosparse.training.config import TrainingConfig
from autosparse.training.steppers import Ranks

SPARSITIES = (0.0, 0.9, 0.95, 0.98)
BATCH, SIDE, CLASSES, WARM_UP = 32, 32, 10, 2
STAGE = 1
OTHER_STAGES = (0, 2, 3)
SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 25)
"""Bytes of the collectives that latency and rate are fitted on."""
SCATTERS = (0.5, 0.9)
"""Sparsities that the cost of scattering is fitted on."""


def model_at(sparsity: float) -> nn.Module:
    """Return the model, compact under random masks unless dense."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=CLASSES)
    if not sparsity:
        return model
    found = {name: _mask(weight, sparsity) for name, weight in prunable(model).items()}
    return compact(model, Ticket.from_model(model, found, {}))


def _mask(weight: Tensor, sparsity: float) -> Tensor:
    flat = torch.zeros(weight.numel(), dtype=torch.bool)
    flat[torch.randperm(weight.numel())[: keep_count(weight.numel(), sparsity)]] = True
    return flat.view(weight.shape)


def engine_for(sparsity: float, stage: int, ranks: Ranks) -> Any:
    """Return DeepSpeed's engine around the model, with dense products, as on a GPU."""
    model = model_at(sparsity)
    config = SparseTrainConfig(
        training=TrainingConfig(batch_size=BATCH * ranks.world_size),
        deepspeed=DeepSpeedConfig(zero_stage=stage),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    settings = engine_config(config, ranks)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def batch(rank: int) -> tuple[Tensor, Tensor]:
    """Return random images and labels."""
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
    return images, torch.randint(0, CLASSES, (BATCH,), generator=generator)


def stepping(engine: Any, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return a job: one step of the engine."""

    def step() -> None:
        engine.backward(nn.functional.cross_entropy(engine(images), labels))
        engine.step()

    return step


def seconds(job: Callable[[], Any]) -> float:
    """Return a job's seconds, all ranks starting together."""
    dist.barrier()
    started = time.perf_counter()
    job()
    return time.perf_counter() - started


def in_turn(jobs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Time the jobs A B A B … after warming up."""
    for job in jobs.values():
        for _ in range(WARM_UP):
            job()
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            taken[name].append(seconds(job))
    return taken


WHOLE = {
    "all_reduce": (0, "tensor"),
    "reduce": (0, "tensor"),
    "all_gather_into_tensor": (0, "output_tensor"),
    "reduce_scatter_tensor": (1, "input_tensor"),
}
"""Collectives and which of their arguments is the whole tensor, by place and by name."""
UNUSED = ("all_reduce_coalesced", "all_gather_coalesced", "all_gather", "all_to_all_single")


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count the bytes of whole tensors that pass through DeepSpeed's collectives, by kind."""
    found: dict[str, int] = defaultdict(int)
    backend = comm.cdb
    assert backend is not None
    for kind in WHOLE:
        setattr(backend, kind, _counting(getattr(backend, kind), kind, found))
    for kind in UNUSED:
        setattr(backend, kind, _refusing(kind))
    yield found
    for kind in (*WHOLE, *UNUSED):
        delattr(backend, kind)


def _counting(call: Callable, kind: str, found: dict[str, int]) -> Callable:
    place, name = WHOLE[kind]

    def count(*arguments: Any, **named: Any) -> Any:
        tensor = arguments[place] if len(arguments) > place else named[name]
        found[kind] += tensor.numel() * tensor.element_size()
        return call(*arguments, **named)

    return count


def _refusing(kind: str) -> Callable:
    def refuse(*arguments: Any, **named: Any) -> Any:
        raise AssertionError(f"{kind} is not counted")

    return refuse


def optimizer_bytes(engine: Any) -> int:
    """Return the bytes of this rank's optimizer state, fp32 copies included, biggest tensors only.

    A rank's partition is padded; step counters (one number per group) are left out.
    """
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    tensors = [t for state in inner.state.values() for t in state.values() if torch.is_tensor(t)]
    copies = getattr(engine.optimizer, "single_partition_of_fp32_groups", None)
    if copies is None:
        copies = getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])
    return sum(t.numel() * t.element_size() for t in (*tensors, *copies) if t.numel() > 1)


def saved(engine: Any, folder: str) -> dict[str, float]:
    """Save a checkpoint; return its bytes and seconds."""
    place = Path(folder) / "checkpoint"
    taken = seconds(lambda: engine.save_checkpoint(str(place), tag="one"))
    dist.barrier()
    sizes = [path.stat().st_size for path in place.rglob("*") if path.is_file()]
    dist.barrier()
    return {"bytes": sum(sizes), "seconds": taken}


def scattering(sparsity: float) -> Callable[[], None]:
    """Return a job: scatter every weight of the model and gather a gradient."""
    model = model_at(sparsity)
    parts = [part for _, part in compact_weights(model)]
    values = [torch.zeros(len(part.index), requires_grad=True) for part in parts]
    gradients = [torch.ones(part.shape) for part in parts]

    def job() -> None:
        for part, value, gradient in zip(parts, values, gradients, strict=True):
            part(value).backward(gradient)
            value.grad = None

    return job


def collective_seconds(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Time all-reduce and all-gather over tensors of growing size."""
    jobs: dict[str, dict[str, Callable[[], Any]]] = {"all_reduce": {}, "all_gather": {}}
    for size in SIZES:
        whole = torch.ones(size // 4)
        part = whole.chunk(dist.get_world_size())[dist.get_rank()].clone()
        jobs["all_reduce"][str(size)] = lambda whole=whole: dist.all_reduce(whole)
        jobs["all_gather"][str(size)] = lambda whole=whole, part=part: dist.all_gather_into_tensor(
            whole, part
        )
    return {kind: in_turn(each, rounds) for kind, each in jobs.items()}


def bytes_of(engine: Any, step: Callable[[], None]) -> dict[str, Any]:
    """Return what one step communicates, and the bytes of state and checkpoint."""
    with counted() as found:
        step()
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared, 0)
        checkpoint = saved(engine, shared[0])
    return {
        "collectives": dict(found),
        "optimizer": optimizer_bytes(engine),
        "checkpoint": checkpoint["bytes"],
        "checkpoint_seconds": checkpoint["seconds"],
    }


def measure(ranks: Ranks, rounds: int) -> dict[str, Any]:
    """Measure all of it."""
    images, labels = batch(ranks.rank)
    engines = {str(sparsity): engine_for(sparsity, STAGE, ranks) for sparsity in SPARSITIES}
    steps: dict[str, Callable[[], Any]] = {
        name: stepping(engine, images, labels) for name, engine in engines.items()
    }
    found: dict[str, Any] = {"steps": in_turn(steps, rounds)}
    found["bytes"] = {name: bytes_of(engine, steps[name]) for name, engine in engines.items()}
    found["scatter"] = in_turn({str(each): scattering(each) for each in SCATTERS}, rounds)
    if ranks.world_size > 1:
        found["network"] = collective_seconds(rounds)
        found["stages"] = {str(stage): other_stage(stage, ranks) for stage in OTHER_STAGES}
    return found


def other_stage(stage: int, ranks: Ranks) -> dict[str, Any]:
    """Return bytes at 90 % under another ZeRO stage."""
    engine = engine_for(0.9, stage, ranks)
    step = stepping(engine, *batch(ranks.rank))
    step()
    result = bytes_of(engine, step)
    engine.destroy()
    return result


def main(folder: Path, rounds: int) -> None:
    """Measure on this rank and write what was found."""
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    write_json(folder / f"rank{ranks.rank}.json", measure(ranks, rounds))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
