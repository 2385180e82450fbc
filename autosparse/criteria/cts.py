"""Concrete Ticket Search (CTS): learn which of the frozen initial weights to keep.

Paper: T. Arora, C. Teuscher, Winning the Lottery by Preserving Network Training Dynamics with
Concrete Ticket Search, arXiv 2512.07142. Every weight has a log-odds φ and a gate
z = sigmoid((φ + ln u - ln(1 - u)) / τ), u uniform, drawn anew for every batch (binary Concrete);
the network runs on z * θ, and θ stays. φ descends the gradient g of an objective; with `kl` that is
KL(sparse ‖ dense) of the two networks' class probabilities (CTS-KL, the paper's best).
GradBalance sets the price of a weight: while the expected count, the sum of sigmoid(φ), is above
its limit, g + λ * d(count)/dφ with λ = |g| / |d(count)/dφ|, so that both pull alike; else λ = 0.
In the end the highest φ are kept.

From the abstract and, for settings, one public version of the authors' code: Adam with a rate of
0.1, a tenth of it in the last 12 % of the steps; τ = 2/3, constant; all φ begin at the odds of the
density; λ is a running mean (1 % new), and the limit is 1.1 times the weights to keep.

Chosen here: the number of steps (the code has epochs: 1/8, 1/2 or all of a training's); the search
begins at initialization, in the mode of scoring (in train mode both networks use the batch's own
statistics; the authors search in eval mode, ResNet-20 after 9 epochs of training). The count is
that of gates above one half; the code weighs φ by τ inside gates, and not in the count. At least
one weight stays in every layer. `beginning` and `trust` are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from autosparse.core.errors import RunFailed, UsageError, unknown
from autosparse.core.ranges import check_ranges
from autosparse.criteria.base import Masks, get, register
from autosparse.criteria.short_irp import endless
from autosparse.models.contract import each_float, outputs_of
from autosparse.models.gradients import Batch, LossFn, note, spend, with_weights
from autosparse.models.restore import untouched
from autosparse.models.standardised import kernels_gated
from autosparse.models.zoo import device_of
from autosparse.sparsity import masks
from autosparse.sparsity.counts import keep_count

OBJECTIVES = {"kl": 4 / 3, "loss": 1.0}
"""Objective -> passes that a step takes over its images; kl runs the dense network forward too."""
UNIFORM = "uniform"
ROOM = 1.1
"""The limit of GradBalance, as a multiple of the weights to keep."""
SMOOTHING = 0.01
"""How much of every step's λ goes into the running mean."""
LAST, CUT = 0.88, 0.1
"""From this share of the steps on, the rate is so much of what it was."""
NEAREST = 1e-4
"""How near a probability may begin to 0 and 1, so that no gate is stuck."""
BATCHES = 2
"""Training batches that a criterion to begin with sees, if it needs data."""
RANGES = {
    "steps": "whole and at least 1",
    "learning_rate": "above 0",
    "temperature": "above 0",
    "trust": "at least 0 and below 1",
    "batch_size": "whole and at least 1",
}


def files_of(beginning: str = UNIFORM, objective: str = "kl", **_) -> dict[str, Any]:
    """Return what the criterion to begin with depends on: its files and defaults of today.

    Raises UsageError, before any work, where there is no such criterion or objective.
    """
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    if beginning == UNIFORM:
        return {}
    other = get(beginning)
    if other.trains:
        raise UsageError(f"cts: beginning must be uniform or a criterion that does not train, "
                         f"and {beginning} does")  # fmt: skip
    defaults = {f"{beginning}.{key}": each for key, each in other.changed_defaults(()).items()}
    return defaults | (other.provenance() if other.provenance else {})


@register("cts", needs_data=True, trains=True, chooses=True, provenance=files_of)
def cts(
    model,
    parameters,
    batches,
    loss_fn,
    *,
    sparsity: float,
    objective: str = "kl",
    steps: int = 1000,
    learning_rate: float = 0.1,
    temperature: float = 2 / 3,
    beginning: str = UNIFORM,
    trust: float = 0.0,
    batch_size: int = 64,
    seed: int = 0,
) -> Masks:
    """Return the masks of the highest log-odds after the search; ties go by position.

    Args:
        sparsity: fraction of weights to remove.
        objective: kl (of the outputs, class scores [B, C, …], to the dense network's, summed where
            there are several) or loss (the task's). A step of kl costs 4/3 passes of its images, a
            step of loss 1.
        steps: of Adam, at least 1, each on one batch.
        learning_rate: of Adam, above 0, in log-odds.
        temperature: τ of the gates, above 0.
        beginning: what layer densities the search begins at: uniform, or those of a criterion that
            does not train (erk, autos …), with its own defaults; its cost is added.
        trust: how much of the weights that the beginning keeps is taken over, at least 0 and below
            1: in a layer of density d they begin at trust + (1 - trust) d, the others at
            (1 - trust) d.
        batch_size: images per step, where the training data are named (see `prune`).
        seed: fixes the gates' noise, dropout, and what the beginning draws.
    """
    settings = _Settings(
        sparsity, objective, steps, learning_rate, temperature, beginning, trust, batch_size, seed
    )
    settings.check()
    if iter(batches) is batches:
        batches = list(islice(batches, max(steps, BATCHES)))
    device = device_of(model)
    first = [_moved(batch, device) for batch in islice(batches, BATCHES)]
    if not first:
        raise UsageError("criterion cts needs data, and there is no batch")
    start = probabilities(model, parameters, first, loss_fn, settings)
    del first
    torch.manual_seed(seed)
    odds = _flat(start).logit_(NEAREST).requires_grad_()
    search(model, parameters, batches, loss_fn, odds, settings)
    if not odds.isfinite().all():
        raise RunFailed("cts: the search is not finite; lower options.learning_rate")
    note("expected_density", float(odds.detach().sigmoid().mean()))
    return masks.keep(_split(odds.detach(), parameters), keep_count(len(odds), sparsity))


@dataclass(frozen=True)
class _Settings:
    """The options of `cts`; see there."""

    sparsity: float
    objective: str
    steps: int
    learning_rate: float
    temperature: float
    beginning: str
    trust: float
    batch_size: int
    seed: int

    def check(self) -> None:
        check_ranges(self, RANGES, "cts: ")
        files_of(self.beginning, self.objective)


def probabilities(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    batches: Sequence[Batch],
    loss_fn: LossFn,
    settings: _Settings,
) -> dict[str, Tensor]:
    """Return the chance that every weight begins with; they add up to the weights to keep."""
    total = masks.total(parameters)
    count = keep_count(total, settings.sparsity)
    empty = {
        name: torch.empty_like(each, dtype=torch.promote_types(each.dtype, torch.float32))
        for name, each in parameters.items()
    }
    if settings.beginning == UNIFORM:
        return {name: each.detach().fill_(count / total) for name, each in empty.items()}
    other = get(settings.beginning)
    known = {"sparsity": settings.sparsity, "seed": settings.seed}
    options = {key: value for key, value in known.items() if key in other.options}
    with untouched(model):
        scores = other.function(model, parameters, batches, loss_fn, **options)
    chosen = scores if other.makes_choice(options) else masks.keep(scores, count)
    trust = settings.trust
    return {
        name: each.copy_(trust * chosen[name] + (1 - trust) * chosen[name].double().mean())
        for name, each in empty.items()
    }


def search(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    batches: Any,
    loss_fn: LossFn,
    odds: Tensor,
    settings: _Settings,
) -> None:
    """Take the steps; `odds` [all weights, end to end] are changed in place."""
    device = device_of(model)
    optimizer = torch.optim.Adam([odds], lr=settings.learning_rate)
    balance = GradBalance(ROOM * keep_count(len(odds), settings.sparsity))
    for step, batch in enumerate(islice(endless(batches), settings.steps)):
        if step == math.ceil(LAST * settings.steps):
            optimizer.param_groups[0]["lr"] *= CUT
        images, labels = _moved(batch, device)
        gates = _split(gate(odds, settings.temperature), parameters)
        value = _objective(model, parameters, gates, images, labels, loss_fn, settings.objective)
        del gates
        (task,) = torch.autograd.grad(value, [odds])
        odds.grad = balance(odds.detach(), task)
        del value, task
        optimizer.step()
        spend(len(labels), OBJECTIVES[settings.objective])


def gate(odds: Tensor, temperature: float) -> Tensor:
    """Draw binary Concrete gates in (0, 1): above one half with chance sigmoid(odds)."""
    tiny = torch.finfo(odds.dtype).eps
    uniform = torch.rand_like(odds, requires_grad=False).clamp_(tiny, 1 - tiny)
    return torch.sigmoid((odds + uniform.logit_()) / temperature)


class GradBalance:
    """Adds the gradient of the expected count to the objective's, as strong as that is."""

    def __init__(self, limit: float) -> None:
        self.limit, self.price = limit, None

    def __call__(self, odds: Tensor, task: Tensor) -> Tensor:
        """Return task + λ * d(count)/d(odds); λ moves to |task| / |d(count)/d(odds)|, or to 0.

        It moves to 0 while no more weights are expected than the limit.

        Args:
            odds: log-odds [d]; the expected count is the sum of their sigmoids.
            task: the objective's gradient with respect to them [d].
        """
        chance = odds.sigmoid()
        over = chance.sum(dtype=torch.float64) > self.limit
        pull = chance.mul_(1 - chance)
        norm, other = (torch.linalg.vector_norm(each, dtype=torch.float64) for each in (task, pull))
        target = torch.where(over, norm / other.clamp(min=1e-30), 0.0)
        self.price = target if self.price is None else self.price.lerp(target, SMOOTHING)
        return pull.mul_(self.price.to(pull.dtype)).add_(task)


def _objective(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    gates: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    loss_fn: LossFn,
    objective: str,
) -> Tensor:
    """Return what is to become small, for one draw of gates, as a mean over the images."""
    gated = {n: each.detach() * gates[n].to(each.dtype) for n, each in parameters.items()}
    with kernels_gated(model, gates):
        outputs = with_weights(model, gated)(images)
    if objective == "loss":
        return loss_fn(outputs, labels)
    with torch.no_grad():
        dense = outputs_of(model, images)
    pairs = zip(_class_scores(outputs), _class_scores(dense), strict=True)
    return torch.stack([reverse_kl(*pair) for pair in pairs]).sum()


def reverse_kl(sparse: Tensor, dense: Tensor) -> Tensor:
    """Return KL(sparse ‖ dense) of the class probabilities of logits [B, C, …], mean over B."""
    sparse, dense = sparse.log_softmax(1), dense.log_softmax(1)
    return kl_div(dense, sparse, reduction="batchmean", log_target=True)


def _class_scores(outputs: Any) -> list[Tensor]:
    """Return all floats [B, two or more, …] among the outputs."""
    class_scores: list[Tensor] = []
    each_float(lambda part: class_scores.append(part) or part, outputs)
    class_scores = [each for each in class_scores if each.ndim > 1 and each.shape[1] > 1]
    if not class_scores:
        raise UsageError(
            "cts: objective kl compares class scores [B, classes], and there are none among the "
            "model's outputs; set options.objective to loss"
        )
    return class_scores


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([each.detach().flatten() for each in tensors.values()])


def _split(flat: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut what lies end to end into tensors of the weights' shapes."""
    pieces = flat.split([each.numel() for each in parameters.values()])
    return {
        name: piece.view(each.shape)
        for piece, (name, each) in zip(pieces, parameters.items(), strict=True)
    }


def _moved(batch: Batch, device: torch.device) -> Batch:
    return batch[0].to(device), batch[1].to(device)
