"""The ranks of a training under DeepSpeed: their places and devices, and when all of them stop."""

from __future__ import annotations

import os
import signal
import warnings
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed.elastic.utils.distributed import get_free_port

from autosparse.core.errors import UsageError
from autosparse.training.steppers import Ranks

LAUNCHERS = (
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
)
"""Variables in which srun and OpenMPI's mpirun give rank, local rank and world size."""
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "WORLD_SIZE")
"""Variables in which torchrun, DeepSpeed and mpirun give the ranks of this machine, and the last
resort: all ranks."""
BOUND = "SLURM_CPUS_PER_TASK"
"""How many cores srun gives a task, where it starts the ranks."""


def on_gpu() -> bool:
    """Whether DeepSpeed trains on CUDA GPUs."""
    accelerator = deepspeed.get_accelerator()
    return accelerator is not None and accelerator.device_name() == "cuda"


def take_place() -> None:
    """Set RANK, LOCAL_RANK and WORLD_SIZE as the launcher says, or for a process by itself."""
    if "RANK" in os.environ:
        return
    for names in LAUNCHERS:
        if all(name in os.environ for name in names) and int(os.environ[names[2]]) > 1:
            if "MASTER_ADDR" not in os.environ:
                raise UsageError(
                    f"{names[0]} says that there are other ranks: set MASTER_ADDR (and "
                    "MASTER_PORT) to the first host"
                )
            os.environ.setdefault("MASTER_PORT", "29500")  # As torchrun and DeepSpeed have it.
            rank, local, world = (os.environ[name] for name in names)
            os.environ.update(RANK=rank, LOCAL_RANK=local, WORLD_SIZE=world)
            return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(get_free_port())


def is_first() -> bool:
    """Return whether this process is rank 0 (or alone), before anything is initialised."""
    take_place()
    return os.environ["RANK"] == "0"


def start() -> tuple[Ranks, str]:
    """Join the other ranks (or stand alone); return our place and device."""
    take_place()
    silence()
    gpu = on_gpu()
    device = own_gpu(torch.cuda.device_count()) if gpu else "cpu"
    if not gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads())
    deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo", verbose=False)
    if gpu:
        torch.cuda.set_device(device)
    return Ranks(dist.get_rank(), dist.get_world_size()), device


def threads() -> int:
    """Return this rank's share of the cores that the ranks of this machine may use."""
    name = next(each for each in LOCAL_SIZES if each in os.environ)
    if name == "WORLD_SIZE" and BOUND in os.environ:
        return int(os.environ[BOUND])
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ[name]))


def own_gpu(visible: int) -> str:
    """Return the GPU of this rank, one of the `visible` ones: under Slurm each task may see one.

    DeepSpeed takes LOCAL_RANK for the number of the GPU, so that is changed too.
    """
    local = str(int(os.environ["LOCAL_RANK"]) % visible)
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        if name in os.environ:
            os.environ[name] = local
    return f"cuda:{local}"


def silence() -> None:
    """Hide torch's warnings about deprecated functions that DeepSpeed calls: users can't act."""
    warnings.filterwarnings(
        "ignore",
        r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
        FutureWarning,
        r"torch\.distributed\.c10d_logger",
    )


class Stopping:
    """Called after every step: whether any rank was told to stop, the same answer on all ranks.

    The answer is one step old: the all-reduce goes on during the step, and no rank waits for it.
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
        """Wait for the all-reduce that is under way, if any; return its answer."""
        if self.pending is None:
            return False
        self.pending.wait()
        self.pending = None
        return bool(self.flag.item())
