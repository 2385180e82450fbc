"""Training under DeepSpeed: the Stepper, and what launch/train_sparse.py runs."""

from __future__ import annotations

import os
import socket
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from autosparse import data as data_module
from autosparse.config import SparseTrainConfig, run_id
from autosparse.errors import RunFailed, UsageError
from autosparse.progress import Progress
from autosparse.sparse_training import Cell, Observer, cells, train_cell
from autosparse.training import (
    Epoch,
    History,
    Ranks,
    advance,
    optimizer_and_schedule,
)

NEVER = 2**31 - 1


class DeepSpeedStepper:
    """One rank of a DeepSpeed engine around a (compact) model."""

    def __init__(
        self, model: nn.Module, config: SparseTrainConfig, steps_per_epoch: int, ranks: Ranks
    ) -> None:
        self.config, self.ranks, self.module = config, ranks, model
        self.accumulation = config.deepspeed.gradient_accumulation
        self.optimizer, self.scheduler = optimizer_and_schedule(
            model, config.training, steps_per_epoch
        )
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=engine_config(config, ranks)
        )
        self.model = self.engine
        self.loss_fn = nn.CrossEntropyLoss(label_smoothing=config.training.label_smoothing)
        self.updates = 0

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        total = torch.zeros((), device=images.device)
        micro = len(images) // self.accumulation
        for part, targets in zip(images.split(micro), labels.split(micro), strict=True):
            loss = self.loss_fn(self.model(part).float(), targets)
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach() / self.accumulation
        self.updates += 1
        advance(self.scheduler, self.updates)
        return total

    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def state_dict(self) -> dict[str, Tensor]:
        """Gather the whole state dict on every rank."""
        sharded = self.config.deepspeed.zero_stage == 3
        parameters = list(self.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters) if sharded else nullcontext():
            return {name: t.detach().clone() for name, t in self.module.state_dict().items()}

    def save(self, folder: Path, history: History) -> None:
        client = {"history": history.plain(), "updates": self.updates, "rng": torch.get_rng_state()}
        self.engine.save_checkpoint(
            str(folder / "deepspeed"), tag=f"epoch{len(history.epochs)}", client_state=client
        )

    def load(self, folder: Path) -> History | None:
        if not (folder / "deepspeed" / "latest").is_file():
            return None
        path, client = self.engine.load_checkpoint(str(folder / "deepspeed"))
        if path is None or client is None:
            return None
        self.updates = client["updates"]
        torch.set_rng_state(client["rng"])
        advance(self.scheduler, self.updates)
        return History([Epoch(**epoch) for epoch in client["history"]])

    def close(self) -> None:
        """Let go of the engine's memory and hooks."""
        self.engine.destroy()


def engine_config(config: SparseTrainConfig, ranks: Ranks) -> dict[str, Any]:
    """Return DeepSpeed's own config for ours; raise UsageError for what does not divide."""
    for name in ("compile", "channels_last"):
        if getattr(config.training, name):
            raise UsageError(f"training.{name} does not work under DeepSpeed yet; leave it out")
    parts = ranks.world_size * config.deepspeed.gradient_accumulation
    if config.training.batch_size % parts:
        raise UsageError(
            f"batch_size {config.training.batch_size} does not divide by {ranks.world_size} ranks "
            f"times {config.deepspeed.gradient_accumulation} accumulation steps"
        )
    if config.deepspeed.zero_stage not in (0, 1, 2, 3):
        raise UsageError(f"deepspeed.zero_stage must be 0 to 3: {config.deepspeed.zero_stage}")
    if config.training.precision not in ("fp32", "bf16"):
        raise UsageError(f"training.precision must be fp32 or bf16: {config.training.precision}")
    return {
        "train_micro_batch_size_per_gpu": config.training.batch_size // parts,
        "gradient_accumulation_steps": config.deepspeed.gradient_accumulation,
        "gradient_clipping": config.training.clip_grad or 0.0,
        "zero_optimization": {"stage": config.deepspeed.zero_stage},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {
            "enabled": config.training.precision == "bf16",
            "dtype": "bfloat16",
        },
        "steps_per_print": NEVER,
    }


def is_first() -> bool:
    """Return whether this process is rank 0 (or alone), before anything is initialised."""
    return os.environ.get("RANK", "0") == "0"


def start() -> tuple[Ranks, str]:
    """Join the other ranks (or stand alone); return our place and device."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in os.environ:
        os.environ.update(alone, MASTER_PORT=str(_free_port()))
    accelerator = deepspeed.get_accelerator()
    gpu = accelerator is not None and accelerator.device_name() == "cuda"
    if not gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
    deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo", verbose=False)
    device = f"cuda:{os.environ['LOCAL_RANK']}" if gpu else "cpu"
    if gpu:
        torch.cuda.set_device(device)
    return Ranks(dist.get_rank(), dist.get_world_size()), device


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train(config: SparseTrainConfig, observer: Observer | None = None) -> list[dict[str, Any]]:
    """Train all cells of a config on all ranks, one cell after another; return their results.

    `observer` is told of everything on rank 0.
    """
    ranks, device = start()
    todo = list(cells(config))
    agree(todo, ranks)
    first = ranks.rank == 0
    sources: dict[str, Any] = {}
    results = []
    with Progress(enabled=first) as progress:
        left = sum(not cell.done for cell in todo)
        bar = progress.bar("sparse training", total=left * config.training.epochs, unit="epochs")
        for cell in todo:
            if cell.done:
                results.append(cell.result())
                continue
            key = run_id(cell.data)
            if key not in sources:
                sources[key] = data_module.load(cell.data).to(torch.device(device))
            bar.describe(f"sparse training: {cell.name}")
            made: list[DeepSpeedStepper] = []

            def make(model: nn.Module, steps: int, made=made) -> DeepSpeedStepper:
                made.append(DeepSpeedStepper(model, config, steps, ranks))
                return made[0]

            results.append(
                train_cell(
                    cell,
                    config,
                    sources[key],
                    make,
                    device=device,
                    ranks=ranks,
                    observer=observer if first else None,
                    on_epoch=lambda _: bar.advance(),
                )
            )
            dist.barrier()
            made[0].close()
    return results


def agree(todo: list[Cell], ranks: Ranks) -> None:
    """Raise RunFailed on every rank unless all ranks hold the same tickets and finished cells."""
    mine = [(cell.name, cell.ticket.content_hash, cell.done) for cell in todo]
    everyone: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise RunFailed(f"rank {rank} holds other tickets or results than rank 0: {theirs}")
