"""Training under DeepSpeed: the Stepper, and what launch/train_sparse.py runs."""

from __future__ import annotations

import os
import signal
import socket
import warnings
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
from autosparse.data import sets
from autosparse.data.sets import DataSource
from autosparse.integrations import deepspeed_checkpoints as checkpoints
from autosparse.integrations.deepspeed_checkpoints import Checkpoint
from autosparse.integrations.deepspeed_values import kept_by, loss_scale
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
TOPOLOGY_FILE = "topology.safetensors"
"""In a checkpoint, where `training.topology` moves: which weights survive, and the history."""
LOW_PRECISION = [
    *get_default_autocast_lower_precision_modules(),
    f"{ParametrizationList.__module__}.{ParametrizationList.__name__}",
]
"""Modules whose gradients are sent in the dtype of autocast: also those of compact values."""
LAUNCHERS = (
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
)
"""What srun and OpenMPI's mpirun call rank, local rank and world size."""


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
        self.found = checkpoints.newest(folder / CHECKPOINTS, ranks) if folder else None
        self.convert = self.found is not None and needs_conversion(config, self.found, ranks)
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
        self.updates = 0
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
        hears, scale = self.topology.hears(self.updates), loss_scale(self.engine)
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
        self.updates += 1
        advance(self.scheduler, self.updates)
        if self.ema is not None:
            self.ema.update(self.module, self.updates)
        if self.topology.due(self.updates - 1):
            average = None if self.ema is None else self.ema.module
            shape = tuple(images.shape[1:])
            self.topology.exchange(self.updates, self.seed, self.kept, shape, average, scale)
            self.scattered = nullcontext  # Its memory goes before the new one's is there.
            self.scattered = self._scatterer()
        return total

    @property
    def skipped(self) -> int:
        """Steps that DeepSpeed skipped, as gradients had overflown."""
        return int(self.engine.skipped_steps)

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
        }
        checkpoints.begin(parent, self.updates, self.ranks)
        self.engine.save_checkpoint(str(parent), tag=tag, client_state=client, save_latest=False)
        mine = {name: buffer.cpu() for name, buffer in self._buffers().items()}
        write_tensors(parent / tag / _buffers_file(self.ranks.rank), mine, {})
        if self.ranks.rank == 0 and self.topology.weights:
            header = {"history": self.topology.history}
            write_tensors(parent / tag / TOPOLOGY_FILE, self.topology.indices(), header)
        checkpoints.commit(parent, self.updates, self.ranks)

    def _buffers(self) -> dict[str, Tensor]:
        """What every rank has of its own: running statistics, by name."""
        networks = {"": self.module} if self.ema is None else {"": self.module, "ema.": self.ema}
        return {
            prefix + name: buffer
            for prefix, network in networks.items()
            for name, buffer in network.named_buffers()
            if not name.endswith((".index", ".moved", ".fingerprint"))
        }

    def load(self, folder: Path) -> History | None:
        """Go back to the checkpoint that was found at the start."""
        if self.found is None:
            return None
        parent = folder / CHECKPOINTS
        tag = self.found.tag
        if self.convert:
            tag = checkpoints.universal(self.found, self.ranks).name
        self._restore_topology(self.found.folder / TOPOLOGY_FILE)
        with own_settings(self.optimizer):
            path, client = self.engine.load_checkpoint(str(parent), tag=tag)
        if path is None or client is None:
            raise RunFailed(f"{self.found.folder} cannot be loaded; remove it to start anew")
        if self.ema is not None:
            self.ema.module.load_state_dict(client["ema"])
        mine = _buffers_file(self.ranks.rank % self.found.world_size)
        tensors, _ = read_tensors(self.found.folder / mine)
        with torch.no_grad():
            for name, buffer in self._buffers().items():
                buffer.copy_(tensors[name])
        self.updates = client["updates"]
        advance(self.scheduler, self.updates)
        return History.of_state(client["history"])

    def _restore_topology(self, path: Path) -> None:
        """Let those weights survive whose values a checkpoint holds."""
        if self.topology.weights:
            indices, header = read_tensors(path)
            average = None if self.ema is None else self.ema.module
            self.topology.restore(indices, header["history"], average)
            self.scattered = self._scatterer()

    def close(self) -> None:
        """Let go of the engine's memory and hooks."""
        self.engine.destroy()


@contextmanager
def own_settings(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Undo what loading a universal checkpoint shares under ZeRO 3.

    DeepSpeed gives all groups the settings of the first, its weight decay too, and all parameters
    one counter of steps, which then counts each step once for every group.
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


def needs_conversion(config: SparseTrainConfig, found: Checkpoint, ranks: Ranks) -> bool:
    """Whether a checkpoint's optimizer state was shared out over another number of ranks."""
    return config.deepspeed.zero_stage > 0 and found.world_size != ranks.world_size


def engine_config(config: SparseTrainConfig, ranks: Ranks) -> dict[str, Any]:
    """Return DeepSpeed's own config for ours; raise UsageError for what does not divide."""
    stage = config.deepspeed.zero_stage
    for name in ("compile", "ema", "grad_checkpointing"):
        if stage == 3 and getattr(config.training, name):
            raise UsageError(f"training.{name} does not work with deepspeed.zero_stage 3")
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
    if stage not in (0, 1, 2, 3):
        raise UsageError(f"deepspeed.zero_stage must be 0 to 3: {config.deepspeed.zero_stage}")
    return {
        "train_micro_batch_size_per_gpu": config.training.batch_size // parts,
        "gradient_accumulation_steps": config.deepspeed.gradient_accumulation,
        "gradient_clipping": config.training.clip_grad or 0.0,
        "zero_optimization": {"stage": stage, **_overlapping(config, ranks)},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {
            "enabled": config.training.precision != "fp32",
            "dtype": "float16" if config.training.precision == "fp16" else "bfloat16",
            "lower_precision_safe_modules": LOW_PRECISION,
        },
        "steps_per_print": NEVER,
    }


def _overlapping(config: SparseTrainConfig, ranks: Ranks) -> dict[str, bool]:
    """Return what sends gradients of several GPUs while the others are computed."""
    several = _on_gpu() and ranks.world_size > 1
    return {"overlap_comm": config.deepspeed.overlap_comm} if several else {}


def _on_gpu() -> bool:
    accelerator = deepspeed.get_accelerator()
    return accelerator is not None and accelerator.device_name() == "cuda"


def take_place() -> None:
    """Set RANK, LOCAL_RANK and WORLD_SIZE where the launcher names them otherwise, or alone."""
    if "RANK" in os.environ:
        return
    for names in LAUNCHERS:
        if all(name in os.environ for name in names) and int(os.environ[names[2]]) > 1:
            if "MASTER_ADDR" not in os.environ:
                raise UsageError(
                    f"{names[0]} says that there are other ranks: set MASTER_ADDR (and "
                    "MASTER_PORT) to the first host"
                )
            os.environ.setdefault("MASTER_PORT", "29500")
            rank, local, world = (os.environ[name] for name in names)
            os.environ.update(RANK=rank, LOCAL_RANK=local, WORLD_SIZE=world)
            return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(_free_port())


def is_first() -> bool:
    """Return whether this process is rank 0 (or alone), before anything is initialised."""
    take_place()
    return os.environ["RANK"] == "0"


def start() -> tuple[Ranks, str]:
    """Join the other ranks (or stand alone); return our place and device."""
    take_place()
    _silence()
    gpu = _on_gpu()
    device = own_gpu(torch.cuda.device_count()) if gpu else "cpu"
    if not gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
    deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo", verbose=False)
    if gpu:
        torch.cuda.set_device(device)
    return Ranks(dist.get_rank(), dist.get_world_size()), device


def own_gpu(visible: int) -> str:
    """Return this rank's GPU of those that it sees: under Slurm that may be one for each task.

    DeepSpeed takes LOCAL_RANK for the GPU, so that is changed too.
    """
    local = str(int(os.environ["LOCAL_RANK"]) % visible)
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        if name in os.environ:
            os.environ[name] = local
    return f"cuda:{local}"


def _silence() -> None:
    """Leave out what torch says of functions that DeepSpeed calls: only DeepSpeed can act on it."""
    warnings.filterwarnings(
        "ignore",
        r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
        FutureWarning,
        r"torch\.distributed\.c10d_logger",
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Stopping:
    """Asked after every step: whether any rank was told to stop; all get the same answer.

    The answer is that of one step ago, so that nobody waits for it.
    """

    def __init__(self) -> None:
        self.told = False
        self.group: Any = dist.new_group(backend="gloo")
        self.flag = torch.zeros(1, dtype=torch.int32)
        self.pending: Any = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._tell)

    def _tell(self, number: int, frame: Any) -> None:
        self.told = True

    def __call__(self) -> bool:
        stop = self.answer()
        self.flag.fill_(int(self.told))
        self.pending = dist.all_reduce(self.flag, dist.ReduceOp.MAX, self.group, async_op=True)
        return stop

    def answer(self) -> bool:
        """Wait for the answer to the question asked last."""
        if self.pending is None:
            return False
        self.pending.wait()
        self.pending = None
        return bool(self.flag.item())


def train(config: SparseTrainConfig, observer: Observer | None = None) -> list[dict[str, Any]]:
    """Train all cells of a config on all ranks, one cell after another; return their results.

    `observer` is told of everything on rank 0. Told to stop by SIGTERM (or SIGUSR1), all ranks
    save a checkpoint and raise Stopped.
    """
    ranks, device = start()
    engine_config(config, ranks)
    ranks.first_says(lambda: check_config(config, ranks.world_size))
    stop = Stopping()
    todo = list(cells(config, ranks=ranks, device=device))
    first = ranks.rank == 0
    sources: dict[str, Any] = {}
    named: dict[str, Any] = {}
    results = []
    with Progress(enabled=first) as progress:
        for cell in todo:
            key = run_id(cell.data)
            if first and cell.done and key not in named:
                named[key] = sets.if_there(cell.data)
            found = finished(cell, ranks, named.get(key))
            if found is not None:
                if first and observer:
                    observer.found(cell, config)
                results.append(found)
                continue
            if key not in sources:
                sources[key] = sets.load(cell.data).to(torch.device(device))
            watch = StepWatch(progress, cell.name)
            results.append(
                train_one(cell, config, sources[key], ranks, device, stop, watch, observer)
            )
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

    result = train_cell(
        cell, config, source, make, device=device, ranks=ranks,
        observer=observer if ranks.rank == 0 else None, watch=watch, stop=stop,
    )  # fmt: skip
    stop.answer()
    dist.barrier()
    if made:  # Not where another process has finished the cell meanwhile.
        made[0].close()
    return result
