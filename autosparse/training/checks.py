"""What the settings of a training must be, told before any work begins."""

from __future__ import annotations

from pathlib import Path

from timm.optim import list_optimizers
from torch import nn

from autosparse.core.errors import UsageError, unknown
from autosparse.core.ranges import check_ranges
from autosparse.training.config import TrainingConfig
from autosparse.training.optimizers import ELEMENTWISE, optimizer_and_schedule, starts_at_zero
from autosparse.training.topology.base import STATIC
from autosparse.training.topology.chosen import NAMES
from autosparse.training.topology.moving import GROW_FROM

CHOICES = {
    "schedule": ("cosine", "tanh", "poly", "none"),
    "precision": ("fp32", "bf16", "fp16"),
    "topology": NAMES,
    "topology_grow_from": GROW_FROM,
}
RANGES = {
    "epochs": "at least 1",
    "batch_size": "at least 1",
    "weight_decay": "at least 0",
    "bias_rate": "above 0",
    "warmup_epochs": "at least 0",
    "clip_grad": "above 0",
    "checkpoint_epochs": "at least 0",
    "checkpoint_steps": "at least 0",
    "mixup": "at least 0",
    "cutmix": "at least 0",
    "label_smoothing": "at least 0 and below 1",
    "ema": "at least 0 and below 1",
    "distill_weight": "at least 0 and at most 1",
    "temperature": "above 0",
    "topology_every": "at least 1",
    "topology_fraction": "above 0 and at most 1",
    "topology_until": "above 0 and at most 1",
    "topology_sparsity": "above 0 and below 1",
    "topology_gradient_weight": "at least 0",
}


def check(config: TrainingConfig) -> None:
    """Raise UsageError for settings that are wrong by themselves."""
    optimizers = [str(each) for each in list_optimizers()]
    for name, known in {"optimizer": optimizers, **CHOICES}.items():
        if getattr(config, name) not in known:
            raise unknown(name, getattr(config, name), known)
    check_ranges(config, RANGES, "training.")
    if config.rescatter and config.compile:
        raise UsageError(
            "training.rescatter breaks what training.compile compiles into single layers; "
            "leave one of them out"
        )
    if config.slim:
        _check_slim(config)
    if config.topology != STATIC and not starts_at_zero(config):
        raise UsageError(
            f"optimizer {config.optimizer} does not keep for every weight a state that starts at "
            f"zero, so that training.topology {config.topology} cannot exchange weights; take one "
            f"of {', '.join(ELEMENTWISE)}, without initial_accumulator_value (rmsproptf starts at "
            "one)"
        )


def _check_slim(config: TrainingConfig) -> None:
    if config.topology != STATIC:
        raise UsageError(
            f"training.topology {config.topology} may bring weights back that read a unit which "
            "training.slim cuts out; leave one of them out"
        )
    if config.optimizer not in ELEMENTWISE:
        raise UsageError(
            f"optimizer {config.optimizer} does not treat every weight by itself, so that "
            f"training.slim would change the training; take one of {', '.join(ELEMENTWISE)}"
        )
    if config.optimizer_options.get("caution"):
        raise UsageError(
            "optimizer_options caution scales by a mean over whole tensors, which training.slim "
            "changes; leave one of them out"
        )
    if config.optimizer_wrapper == "sparseopt":
        raise UsageError(
            "optimizer_wrapper sparseopt scales by the mean density of a layer, which "
            "training.slim changes; leave one of them out"
        )


def check_batches(config: TrainingConfig, world_size: int = 1) -> None:
    """Raise UsageError unless a step's images divide by the ranks and, if mixed, into pairs."""
    if config.batch_size % world_size:
        raise UsageError(f"batch_size {config.batch_size} does not divide by {world_size} ranks")
    each = config.batch_size // world_size
    if (config.mixup or config.cutmix) and each % 2:
        raise UsageError(
            "training.mixup and cutmix need an even number of images per rank and step; "
            f"training.batch_size gives {each}"
        )


def check_whole(config: TrainingConfig, world_size: int = 1) -> None:
    """Raise UsageError for all that the settings alone show to be wrong."""
    check(config)
    optimizer_and_schedule(nn.Linear(2, 2), config, 1)  # Its options, and what needs a GPU.
    check_batches(config, world_size)
    if config.teacher is not None and not Path(config.teacher).is_file():
        raise UsageError(f"training.teacher: no such file: {config.teacher}")


def check_plain(config: TrainingConfig) -> None:
    """Raise UsageError for settings that `PlainStepper` cannot train with."""
    check_whole(config)
    if config.precision == "fp16":
        raise UsageError("training.precision fp16 works under DeepSpeed only; use bf16")
