"""Called on two ranks: return what a step under bf16 reduces, in entries by dtype."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

from deepspeed.comm import comm

from autosparse import compact, prune
from autosparse.data import sets
from autosparse.integrations import deepspeed
from autosparse.sparsity.compact import MARK
from autosparse.study.config import DeepSpeedConfig, SparseTrainConfig
from autosparse.training.steppers import Ranks
from tests.conftest import SMALL_DIGITS, make_model
from tests.integration.masked_dense import BATCH, CASES, batches

NAME, STEPS = "test_vit", 2
REDUCED = {
    "all_reduce": (0, "tensor"),
    "reduce": (0, "tensor"),
    "reduce_scatter_tensor": (1, "input_tensor"),
}
"""Collectives, and which of their arguments is the whole tensor, by place and by name."""
REFUSED = ("all_reduce_coalesced", "reduce_scatter")


@contextmanager
def counted() -> Iterator[Counter]:
    """Count the floats of the whole tensors that DeepSpeed reduces."""
    found: Counter = Counter()
    backend: Any = comm.cdb
    for kind in REDUCED:
        setattr(backend, kind, _counting(getattr(backend, kind), kind, found))
    for kind in REFUSED:
        setattr(backend, kind, _refusing(kind))
    yield found
    for kind in (*REDUCED, *REFUSED):
        delattr(backend, kind)


def _counting(call: Callable, kind: str, found: Counter) -> Callable:
    place, name = REDUCED[kind]

    def count(*arguments: Any, **named: Any) -> Any:
        tensor = arguments[place] if len(arguments) > place else named[name]
        if tensor.is_floating_point():
            found[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
        return call(*arguments, **named)

    return count


def _refusing(kind: str) -> Callable:
    def refuse(*arguments: Any, **named: Any) -> Any:
        raise AssertionError(f"{kind} is not counted")

    return refuse


def reduced(ranks: Ranks, stage: int) -> dict[str, Any]:
    """Return what the last of a few steps reduces, and the losses."""
    source, case = sets.load(SMALL_DIGITS), CASES[NAME]
    model = make_model(NAME, **case.options)
    compact(model, prune(model, source, "erk", case.sparsity))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    settings = replace(case.settings(), ema=0.0, precision="bf16", clip_grad=None)
    config = SparseTrainConfig(training=settings, deepspeed=DeepSpeedConfig(stage))
    stepper = deepspeed.DeepSpeedStepper(model, config, STEPS, ranks)
    stepper.model.train()
    half = BATCH // ranks.world_size
    mine = slice(ranks.rank * half, (ranks.rank + 1) * half)
    losses, last = [], Counter()
    for images, labels in islice(batches(source), STEPS):
        with counted() as reductions:
            losses.append(float(stepper.step(images[mine], labels[mine])))
        last = reductions
    stepper.close()
    values = sum(size for name, size in sizes.items() if MARK in name)
    return {**last, "values": values, "all": sum(sizes.values()), "losses": losses}
