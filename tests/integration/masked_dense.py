"""Masked-dense training on equal parts of every batch: the reference for two ranks.

Written without the package's compact parameters, optimizer groups or loop: dense weights, a mask
multiplied into weights and gradients, and the parts' gradients averaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from autosparse import prune
from autosparse.data.sets import DataSource
from autosparse.training.config import TrainingConfig
from tests.conftest import make_model

STEPS, BATCH = 40, 32
ULP = 2.0**-23
"""Relative distance between neighbours in float32, in which DeepSpeed computes."""
WEIGHT_DECAY, CLIP, EMA = 0.05, 1.0, 0.9
EPSILON = 1e-5
"""Adam's default 1e-8 makes steps out of rounding noise where the true gradient is zero (the one
weight of a filter before batch norm), and noise differs between any two orders of summation."""


@dataclass(frozen=True)
class Case:
    """A model, and settings under which 40 steps teach it something."""

    options: dict[str, str]
    sparsity: float
    learning_rate: float
    accumulation: int = 1
    """Parts of each rank's share of a batch."""

    def settings(self) -> TrainingConfig:
        return TrainingConfig(
            batch_size=BATCH,
            optimizer="adamw",
            learning_rate=self.learning_rate,
            weight_decay=WEIGHT_DECAY,
            clip_grad=CLIP,
            schedule="none",
            ema=EMA,
            optimizer_options={"eps": EPSILON},
        )


CASES = {
    # Smooth: where rounding decides on which side of a ReLU's kink a value falls, equal trainings
    # part (by 1e-5 to 1e-2, depending on the processor).
    "test_byobnet": Case({"act_layer": "silu"}, 0.9, 1e-3),
    "test_vit": Case({"global_pool": "avg"}, 0.8, 3e-3, accumulation=2),
}


def batches(source: DataSource) -> Iterator[tuple[Tensor, Tensor]]:
    """The first 40 batches, the same for everyone."""
    made = 0
    for epoch in range(STEPS):
        for images, labels in source.train.shuffled(BATCH, seed=0, epoch=epoch):
            yield source.prepare(images), labels
            made += 1
            if made == STEPS:
                return


def reference(
    name: str,
    source: DataSource,
    ranks: int,
    dtype: torch.dtype = torch.float64,
    moved: int | None = None,
    steps: int = STEPS,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of every rank in every step [steps, ranks], the moving average of all weights.

    With a seed `moved`, every weight starts one float32 ULP above or below its value.
    """
    case = CASES[name]
    parts = ranks * case.accumulation
    model = make_model(name, **case.options)
    masks = prune(model, source, "erk", case.sparsity).masks
    model.to(dtype)
    if moved is not None:
        one_ulp_beside(model, moved)
    _mask(model, masks)
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    plain = {n for n, p in model.named_parameters() if p.ndim <= 1 or n in exempt}
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in parameters.items() if n not in plain]},
            {"params": [parameters[n] for n in parameters if n in plain], "weight_decay": 0.0},
        ],
        lr=case.learning_rate,
        weight_decay=WEIGHT_DECAY,
        eps=EPSILON,
    )
    losses, average = [], {n: p.detach().double() for n, p in parameters.items()}
    for step, (images, labels) in enumerate(islice(batches(source), steps), start=1):
        model.train()
        pairs = zip(images.chunk(parts), labels.chunk(parts), strict=True)
        parts_losses = [nn.functional.cross_entropy(model(x.to(dtype)), y) for x, y in pairs]
        (sum(parts_losses) / parts).backward()
        for parameter_name, mask in masks.items():
            parameters[parameter_name].grad.mul_(mask)
        nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        _mask(model, masks)
        each = torch.stack([loss.detach().double() for loss in parts_losses])
        losses.append(each.view(ranks, -1).mean(1))
        share = min(EMA, 1 - step ** (-2 / 3))  # timm's warm-up.
        for n, p in parameters.items():
            average[n] = share * average[n] + (1 - share) * p.detach().double()
    return torch.stack(losses), average


def rounding(
    name: str, source: DataSource, ranks: int, exact: tuple[Tensor, dict[str, Tensor]]
) -> tuple[float, float]:
    """How far float32 may lead from `exact`, the reference in float64: losses, averaged weights.

    Measured: a float32 run that starts one ULP beside. Ten times its largest distance, as
    DeepSpeed sums in another order, and two kernels may each err by as much.
    """
    steps = len(exact[0])
    losses, average = reference(name, source, ranks, torch.float32, moved=0, steps=steps)
    weights = max(float((average[n] - wanted).abs().max()) for n, wanted in exact[1].items())
    return 10 * float((losses - exact[0]).abs().max()), 10 * weights


@torch.no_grad()
def one_ulp_beside(model: nn.Module, seed: int) -> None:
    """Move every weight to the float32 number above or below it."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        up = torch.randint(0, 2, parameter.shape, generator=generator).to(parameter.dtype)
        parameter.mul_(1 + ULP * (2 * up - 1))


@torch.no_grad()
def _mask(model: nn.Module, masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        model.get_parameter(name).mul_(mask)
