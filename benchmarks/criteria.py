"""What criteria cost on timm's resnet50 (25 M weights) at 64 px: time and memory.

    python -m benchmarks.criteria --json criteria.json

A pass is one forward and backward of the network in training (all parameters, batch statistics)
over the same 16 images. `NAME_passes` is the time of a criterion in passes, with few rounds where
it has rounds; `NAME_vs_counted` divides that by the passes it counts for itself, so 1 means that
its count is honest. `NAME_memory` is how far memory rises above what model and images take, in
copies of the weights; a pass itself holds its gradients and activations. It is measured with two
images, so that weights count and activations hardly do; tests/criteria/test_dense_copies.py counts
every float.
"""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch.nn.functional import cross_entropy

from autosparse import criteria
from autosparse.models.gradients import Batch, counting
from autosparse.sparsity import masks
from benchmarks.report import figure, publish, seconds_in_turn

IMAGES, FEW_IMAGES, SIDE, SPARSITY = 16, 2, 64, 0.95
FIRST_ROUNDS = 0.1
"""Sparsity after about the first three of sixty rounds, when most memory is taken."""
FEW: dict[str, dict[str, Any]] = {
    "iter_snip": {"rounds": 3},
    "force": {"rounds": 3},
    "ntk_sap": {"rounds": 2, "draws": 1},
    "px": {"rounds": 3},
    "short_irp": {"levels": 2, "steps_per_level": 2},
    "cts": {"steps": 4},
}
QUICK = ("erk", "lamp", "magnitude", "random")
"""Criteria without a pass; their seconds are nearly all in drawing or sorting."""


def measured() -> list[str]:
    """Return the criteria to measure by passes; for AutoS there is benchmarks.scoring."""
    left_out = ("autos", "autos_irp", "synflow", *QUICK)
    return [name for name in criteria.names() if name not in left_out]


def exact_memory() -> None:
    """Make the C library return every large block at once, so that peaks are those of tensors."""
    ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 16)


def peak_above(job: Callable[[], Any]) -> float:
    """Return by how many bytes memory rises while `job` runs (Linux)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    job()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def mask_seconds() -> list[float]:
    """Return how long masks of 25 M weights take from scores."""
    drawn = {f"layer{number}": torch.randn(500, 5000).abs() for number in range(10)}
    return seconds_in_turn({"mask": lambda: masks.from_scores(drawn, SPARSITY)})["mask"]


def network() -> torch.nn.Module:
    """Return resnet50; no block starts as the identity."""
    torch.manual_seed(0)
    return timm.create_model("resnet50", pretrained=False, zero_init_last=False)


def images(count: int) -> Batch:
    """Return noise, each image of another class."""
    return torch.randn(count, 3, SIDE, SIDE), torch.arange(count)


def one_pass(model: torch.nn.Module, batch: Batch) -> None:
    """Make a forward and backward, as training does."""
    model.train()
    model.zero_grad(set_to_none=True)
    cross_entropy(model(batch[0]), batch[1]).backward()
    model.zero_grad(set_to_none=True)


def scores(name: str, model: torch.nn.Module, batch: Batch, **options: Any) -> criteria.Scores:
    """Score by a criterion, at `SPARSITY` unless it is among the options."""
    found = criteria.get(name)
    known: dict[str, Any] = {"sparsity": SPARSITY} if "sparsity" in found.options else {}
    return found(model, [batch], cross_entropy, **known | options)


def memory(name: str) -> float:
    """Return by how many copies of the weights memory rises; to be called in a fresh process."""
    exact_memory()
    model, batch = network(), images(FEW_IMAGES)
    one_pass(model, batch)
    options = FEW.get(name, {"rounds": 3} if name == "synflow" else {})
    if "rounds" in options:
        options = {**options, "sparsity": FIRST_ROUNDS}

    def job() -> None:
        one_pass(model, batch) if name == "pass" else scores(name, model, batch, **options)

    return peak_above(job) / sum(4 * weight.numel() for weight in model.parameters())


def memory_figures() -> dict[str, Any]:
    """Measure memory, each in a process of its own."""
    figures = {}
    for name in ("pass", *sorted([*measured(), "synflow"])):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            found = fresh.submit(memory, name).result()
        figures[f"{name}_memory"] = figure([found], "copies", "", "a pass: pass_memory")
    return figures


def main() -> None:
    """Measure all of them."""
    model, batch, image = network(), images(IMAGES), images(1)
    figures: dict[str, Any] = {}
    taken = seconds_in_turn(
        {"snip": lambda: scores("snip", model, batch), "pass": lambda: one_pass(model, batch)}
    )
    figures["snip_passes"] = figure(_ratios(taken), "passes", "<= 1.3", "forward + backward")
    taken = seconds_in_turn(
        {
            "synflow": lambda: scores("synflow", model, batch, rounds=100),
            "passes": lambda: [one_pass(model, image) for _ in range(100)],
        }
    )
    figures["synflow_vs_100_passes"] = figure(
        _ratios(taken), "times", "<= 1.2", "100 forward + backward of one image"
    )
    figures["mask_seconds_25m"] = figure(mask_seconds(), "s", "< 1", "none")
    for name in measured():
        job = partial(scores, name, model, batch, **FEW.get(name, {}))
        with counting() as cost:
            job()
        runs = 5 if name in ("snip", "grasp", "fisher") else 2
        taken = seconds_in_turn({name: job, "pass": lambda: one_pass(model, batch)}, runs)
        ratios = _ratios(taken)
        counted = cost.image_passes / IMAGES
        if name != "snip":
            figures[f"{name}_passes"] = figure(ratios, "passes", "", "forward + backward")
        honest = [ratio / counted for ratio in ratios]
        figures[f"{name}_vs_counted"] = figure(honest, "times", "", f"{counted:g} counted passes")
    publish({**figures, **memory_figures()}, __doc__)


def _ratios(taken: dict[str, list[float]]) -> list[float]:
    ours, theirs = taken.values()
    return [a / b for a, b in zip(ours, theirs, strict=True)]


if __name__ == "__main__":
    main()
