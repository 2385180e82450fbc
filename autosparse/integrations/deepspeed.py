"""Training under DeepSpeed: the Stepper, and what launch/train_sparse.py runs on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.torch_autocast import get_default_autocast_lower_precision_modules
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from autosparse.core.config import run_id
from autosparse.core.errors import RunFailed, UsageError
from autosparse.core.files import read_tensors, write_tensors
from autosparse.core.progress import Progress
from autosparse.core.ranges import check_ranges
from autosparse.data import sets
from autosparse.data.sets import DataSource
from autosparse.integrations import deepspeed_checkpoints as checkpoints
from autosparse.integrations.deepspeed_ranks import Stopping, on_gpu, start
from autosparse.integrations.deepspeed_values import kept_by, loss_scale, scaler_of
from autosparse.models.contract import in_single
from autosparse.models.zoo import device_of
from autosparse.sparsity.compact import rescattering
from autosparse.study.cells import Cell, cells, check_config
from autosparse.study.config import SparseTrainConfig
from autosparse.study.trainings import CHECKPOINTS, Observer, finished, train_cell
from autosparse.training.checks import check
from autosparse.training.flat_scatter import scatterer
from autosparse.training.optimizers import advance, last_rate, optimizer_and_schedule
from autosparse.training.recipe import Recipe, make_ema, seed_step, step_seed
from autosparse.training.steppers import History, Ranks, set_up
from autosparse.training.topology.base import STATIC
from autosparse.training.topology.chosen import topology_of
from autosparse.training.topology.gradual import SCHEDULES
from autosparse.training.watching import StepWatch
from autosparse.training.wrappers import NONE

NEVER = 2**31 - 1
"""Steps between two lines that DeepSpeed prints of its own."""
TOPOLOGY_FILE = "topology.safetensors"
"""In a checkpoint, where `training.topology` moves: which weights survive, and the history."""
RANGES = {
    "zero_stage": "whole and at least 0 and at most 3",
    "gradient_accumulation": "whole and at least 1",
}
LOW_PRECISION = [
    *get_default_autocast_lower_precision_modules(),
    f"{ParametrizationList.__module__}.{ParametrizationList.__name__}",
]
"""Modules whose gradients DeepSpeed reduces in autocast's dtype: its own, and compact weights."""


class DeepSpeedStepper:
    """One rank of a DeepSpeed engine around a (compact) model.

    Args:
        model: on its device.
        config: how to train.
        steps_per_epoch: for the schedule.
        ranks: this process's place.
        folder: where checkpoints are; the newest whole one there is what `load` goes back to.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SparseTrainConfig,
        steps_per_epoch: int,
        ranks: Ranks,
        folder: Path | None = None,
    ) -> None:
        training = config.training
        check(training)
        self.config, self.ranks, self.module, self.seed = config, ranks, model, 0
        settings = engine_config(config, ranks)
        self.checkpoint = checkpoints.newest(folder / CHECKPOINTS, ranks) if folder else None
        writers = self.checkpoint.world_size if self.checkpoint else ranks.world_size
        # ZeRO shares the optimizer's state out over the ranks that wrote it.
        self.convert = config.deepspeed.zero_stage > 0 and writers != ranks.world_size
        if self.convert:
            settings["checkpoint"] = {"load_universal": True}
        self.settings = settings
        set_up(model, training, sharded=config.deepspeed.zero_stage == 3)
        self.optimizer, self.scheduler = optimizer_and_schedule(model, training, steps_per_epoch)
        self.recipe, self.ema = Recipe(training, model), make_ema(model, training)
        self.topology = topology_of(
            model, training, training.epochs * steps_per_epoch, ranks.world_size
        )
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=settings
        )
        if training.compile:
            self.engine.compile()
        self.model = self.engine
        self.updates = self.skipped = 0
        self.scale = loss_scale(self.engine)
        self.kept = kept_by(self.engine, self.optimizer)
        self.scattered = self._scatterer()

    def _scatterer(self) -> Callable[[], AbstractContextManager]:
        return scatterer(
            self.module, self.config.training, device_of(self.module),
            ranks=self.ranks.world_size, sharded=self.config.deepspeed.zero_stage == 3,
        )  # fmt: skip

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.config.training.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        drawn = step_seed(self.seed, self.updates, self.ranks.rank)
        seed_step(drawn, images.device)
        images, targets = self.recipe.mix(images, labels, drawn)
        total = torch.zeros((), device=images.device)
        parts = self.config.deepspeed.gradient_accumulation
        micro = len(images) // parts
        hears, scale = self.topology.hears(self.updates), self.scale
        with self.topology.listening(self.updates):
            for part, wanted in zip(images.split(micro), targets.split(micro), strict=True):
                with (
                    rescattering(self.config.training.rescatter),
                    nullcontext() if hears else self.scattered(),
                ):
                    outputs = in_single(self.model(part))
                loss = self.recipe.loss(outputs, part, wanted)
                self.engine.backward(loss)
                self.engine.step()
                total += loss.detach() / parts
        self.scale = loss_scale(self.engine)
        self.skipped += self.scale < scale
        self.updates += 1
        advance(self.scheduler, self.updates)
        if self.ema is not None:
            self.ema.update(self.module, self.updates)
        if self.topology.due(self.updates - 1):
            average = None if self.ema is None else self.ema.module
            shape = tuple(images.shape[1:])
            self.topology.exchange(self.updates, self.seed, self.kept, shape, average, scale)
            self.scattered = nullcontext  # Free its memory before the new one takes its own.
            self.scattered = self._scatterer()
        return total

    def evaluated(self) -> nn.Module:
        networks = [self.module] if self.ema is None else [self.module, self.ema.module]
        if self.ranks.world_size > 1:
            for network in networks:
                distribute_bn(network, self.ranks.world_size, reduce=True)
        return self.engine if self.ema is None else self.ema.module

    def learning_rate(self) -> float:
        return last_rate(self.optimizer, self.scheduler, self.updates)

    def state_dict(self) -> dict[str, Tensor]:
        """Gather the whole state dict on every rank."""
        if self.ema is not None:
            return self.ema.module.state_dict()
        sharded = self.config.deepspeed.zero_stage == 3
        parameters = list(self.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters) if sharded else nullcontext():
            return {name: t.detach().clone() for name, t in self.module.state_dict().items()}

    def save(self, folder: Path, history: History) -> None:
        """Write a checkpoint; it counts once all ranks have written theirs."""
        parent, tag = folder / CHECKPOINTS, checkpoints.tag_of(self.updates)
        client = {
            "history": history.state(),
            "updates": self.updates,
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "scaler": scaler.state_dict() if (scaler := scaler_of(self.engine)) else None,
            "skipped": self.skipped,
        }
        checkpoints.begin(parent, self.updates, self.ranks)
        self.engine.save_checkpoint(str(parent), tag=tag, client_state=client, save_latest=False)
        self.ranks.together(lambda: self._write_own(parent / tag))
        checkpoints.commit(parent, self.updates, self.ranks)

    def _write_own(self, folder: Path) -> None:
        """Write what DeepSpeed does not: this rank's buffers, and which weights survive."""
        mine = {name: buffer.cpu() for name, buffer in self._buffers().items()}
        write_tensors(folder / _buffers_file(self.ranks.rank), mine, {})
        if self.ranks.rank == 0 and self.topology.weights:
            header = {"history": self.topology.history}
            write_tensors(folder / TOPOLOGY_FILE, self.topology.indices(), header)

    def _buffers(self) -> dict[str, Tensor]:
        """Return the buffers that differ from rank to rank, by name: running statistics."""
        networks = {"": self.module} if self.ema is None else {"": self.module, "ema.": self.ema}
        return {
            prefix + name: buffer
            for prefix, network in networks.items()
            for name, buffer in network.named_buffers()
            if not name.endswith((".index", ".moved", ".fingerprint"))
        }

    def load(self, folder: Path) -> History | None:
        """Restore the checkpoint that was the newest when this stepper was made."""
        if self.checkpoint is None:
            return None
        parent = folder / CHECKPOINTS
        tag = self.checkpoint.tag
        if self.convert:
            tag = checkpoints.universal(self.checkpoint, self.ranks).name
        self._restore_topology(self.checkpoint.folder / TOPOLOGY_FILE)
        with own_settings(self.optimizer):
            path, client = self.engine.load_checkpoint(str(parent), tag=tag)
        if path is None or client is None:
            raise RunFailed(f"{self.checkpoint.folder} cannot be loaded; remove it to start anew")
        if self.ema is not None:
            self.ema.module.load_state_dict(client["ema"])
        mine = self.checkpoint.folder / _buffers_file(self.ranks.rank % self.checkpoint.world_size)
        tensors, _ = self.ranks.together(lambda: read_tensors(mine))
        with torch.no_grad():
            for name, buffer in self._buffers().items():
                buffer.copy_(tensors[name])
        scaler = scaler_of(self.engine)
        if scaler is not None and client.get("scaler"):  # Earlier versions kept none.
            scaler.load_state_dict(client["scaler"])
            self.scale, self.skipped = scaler.get_scale(), client["skipped"]
        self.updates = client["updates"]
        advance(self.scheduler, self.updates)
        return History.of_state(client["history"])

    def _restore_topology(self, path: Path) -> None:
        """Restore the masks that a checkpoint's values belong to."""
        if self.topology.weights:
            indices, header = self.ranks.together(lambda: read_tensors(path))
            average = None if self.ema is None else self.ema.module
            self.topology.restore(indices, header["history"], average)
            self.scattered = self._scatterer()

    def close(self) -> None:
        """Let go of the engine's memory and hooks."""
        self.engine.destroy()


@contextmanager
def own_settings(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Give every group its settings, and every parameter its step counter, back after loading.

    Under ZeRO 3 a universal checkpoint is loaded with the first group's settings (its weight decay
    among them) in all groups, and with one counter for all parameters, which would then count each
    step once per group.
    """
    settings = [{k: v for k, v in each.items() if k != "params"} for each in optimizer.param_groups]
    yield
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def _buffers_file(rank: int) -> str:
    return f"buffers{rank:05d}.safetensors"


def engine_config(config: SparseTrainConfig, ranks: Ranks) -> dict[str, Any]:
    """Translate our config into DeepSpeed's; raise UsageError for what it cannot do."""
    check_ranges(config.deepspeed, RANGES, "deepspeed.")
    stage = config.deepspeed.zero_stage
    for name in ("compile", "ema", "grad_checkpointing"):
        if stage == 3 and getattr(config.training, name):
            raise UsageError(f"training.{name} does not work with deepspeed.zero_stage 3")
    if stage and config.training.precision == "fp16":
        raise UsageError(
            "DeepSpeed never lowers the loss scale of training.precision fp16 under ZeRO; take "
            "bf16, or set deepspeed.zero_stage 0"
        )
    if config.training.topology in SCHEDULES:
        raise UsageError(
            f"training.topology {config.training.topology} trains in one process, without "
            "DeepSpeed: use `autosparse train`"
        )
    plain = config.training.topology == STATIC and config.training.optimizer_wrapper == NONE
    if stage and config.training.optimizer == "adagrad" and not plain:
        raise UsageError(
            "DeepSpeed makes adagrad anew for ZeRO, without what training.topology and "
            "optimizer_wrapper have added; set deepspeed.zero_stage 0 or take another optimizer"
        )
    parts = ranks.world_size * config.deepspeed.gradient_accumulation
    if config.training.batch_size % parts:
        raise UsageError(
            f"batch_size {config.training.batch_size} does not divide by {ranks.world_size} ranks "
            f"times {config.deepspeed.gradient_accumulation} accumulation steps"
        )
    several = on_gpu() and ranks.world_size > 1
    overlapping = {"overlap_comm": config.deepspeed.overlap_comm} if several else {}
    return {
        "train_micro_batch_size_per_gpu": config.training.batch_size // parts,
        "gradient_accumulation_steps": config.deepspeed.gradient_accumulation,
        "gradient_clipping": config.training.clip_grad or 0.0,
        "zero_optimization": {"stage": stage, **overlapping},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {
            "enabled": config.training.precision != "fp32",
            "dtype": "float16" if config.training.precision == "fp16" else "bfloat16",
            "lower_precision_safe_modules": LOW_PRECISION,
        },
        "steps_per_print": NEVER,
    }


def train(config: SparseTrainConfig, observer: Observer | None = None) -> list[dict[str, Any]]:
    """Train all cells of a config on all ranks, one cell after another; return their results.

    `observer` is told of everything on rank 0. Told to stop by SIGTERM (or SIGUSR1), all ranks
    save a checkpoint and raise Stopped.
    """
    ranks, device = start()
    engine_config(config, ranks)
    ranks.first_says(lambda: check_config(config, ranks.world_size))
    stop, first = Stopping(), ranks.rank == 0
    there: dict[str, DataSource | None] = {}
    sources: dict[str, DataSource] = {}
    results = []
    with Progress(enabled=first) as progress:
        for cell in list(cells(config, ranks=ranks, device=device)):
            data = run_id(cell.data)

            def look(cell: Cell = cell, data: str = data) -> None:
                if cell.done and data not in there:
                    there[data] = sets.if_there(cell.data)

            ranks.first_says(look)
            result = finished(cell, ranks, there.get(data))
            if result is None:
                if data not in sources:
                    sources[data] = ranks.together(
                        lambda cell=cell: sets.load(cell.data).to(torch.device(device))
                    )
                watch = StepWatch(progress, cell.name)
                result = train_one(
                    cell, config, sources[data], ranks, device, stop, watch, observer
                )
            elif first and observer:
                observer.found(cell, config)
            results.append(result)
    return results


def train_one(
    cell: Cell,
    config: SparseTrainConfig,
    source: DataSource,
    ranks: Ranks,
    device: str,
    stop: Stopping,
    watch: StepWatch,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Train a cell on this rank, with all the others; return its result."""
    made: list[DeepSpeedStepper] = []

    def make(model: nn.Module, steps: int) -> DeepSpeedStepper:
        made.append(DeepSpeedStepper(model, config, steps, ranks, cell.folder))
        return made[0]

    def leave() -> None:
        stop.answer()
        dist.barrier()
        if made:  # Not where another process has finished the cell meanwhile.
            made[0].close()

    try:
        result = train_cell(
            cell, config, source, make, device=device, ranks=ranks,
            observer=observer if ranks.rank == 0 else None, watch=watch, stop=stop,
        )  # fmt: skip
    except (RunFailed, UsageError) as error:
        if error.everywhere:  # Then all ranks may go on with another cell.
            leave()
        raise
    leave()
    return result
