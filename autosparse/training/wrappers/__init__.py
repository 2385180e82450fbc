"""Methods of sparse training that go on top of any optimizer (`training.optimizer_wrapper`).

Each is hooks on an optimizer's step or on gradients, and keeps no state: so checkpoints, resumes
and ZeRO's partitions are those of the optimizer itself. One file each, named after the method.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import nn

from autosparse.core.errors import UsageError, unknown
from autosparse.training.config import TrainingConfig
from autosparse.training.wrappers.ham import ham
from autosparse.training.wrappers.sign_in import sign_in
from autosparse.training.wrappers.sparseopt import sparseopt

NONE = "none"
WRAPPERS: dict[str, Callable[..., None]] = {
    "ham": ham,
    "sign_in": sign_in,
    "sparseopt": sparseopt,
}


def wrap(optimizer: torch.optim.Optimizer, model: nn.Module, config: TrainingConfig) -> None:
    """Add the wrapper that `config` names to an optimizer, in place; raise UsageError if it cannot.

    Args:
        optimizer: its groups say which of them are of weights (`optimizers.WEIGHTS`).
        model: what it trains.
        config: the training's.
    """
    name, options = config.optimizer_wrapper, config.optimizer_wrapper_options
    if name == NONE:
        if options:
            raise UsageError("training.optimizer_wrapper_options need an optimizer_wrapper")
        return
    if name not in WRAPPERS:
        raise unknown("optimizer_wrapper", name, (NONE, *WRAPPERS))
    known = list(inspect.signature(WRAPPERS[name]).parameters)[2:]
    for key, value in options.items():
        if key not in known:
            raise unknown(f"option of optimizer_wrapper {name}", key, known)
        if not isinstance(value, int | float) or value < 0:
            raise UsageError(f"optimizer_wrapper {name}: {key} must be at least 0, got {value}")
    WRAPPERS[name](optimizer, model, **options)
