"""Batch norm's running statistics: how they are set before scoring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from autosparse.models.contract import outputs_of
from autosparse.models.gradients import Batches, mean_of


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the batch norms of a model."""
    return [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]


@contextmanager
def last_statistics(norms: Sequence[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """Inside, batch norms in train mode keep the statistics of the last batch alone."""
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 1.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def warm_up(model: nn.Module, batches: Batches) -> None:
    """Set the statistics of all batch norms to their mean over the batches, weighed by samples."""
    norms = [norm for norm in batch_norms(model) if norm.track_running_stats]
    like = {
        f"{number} {key}": getattr(norm, key)
        for number, norm in enumerate(norms)
        for key in ("running_mean", "running_var")
    }
    if not like:
        return

    def part(images: Tensor, labels: Tensor) -> list[Tensor]:
        with torch.no_grad():
            outputs_of(model, images)
        return [statistic.clone() for statistic in like.values()]

    model.train()
    with last_statistics(norms):
        means = mean_of(batches, part, like, passes=1 / 3)
    for name, statistic in like.items():
        statistic.copy_(means[name])
