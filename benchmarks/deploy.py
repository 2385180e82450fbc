"""What a slimmed ticket saves where people run networks: ONNX Runtime on this CPU, and accuracy.

    python -m benchmarks.deploy --json deploy.json                       # latency alone
    python -m benchmarks.deploy --json deploy.json --seeds 3 --data data/cifar10 --epochs 30
    python -m benchmarks.deploy --models resnet18 --sparsities 0.98 --side 64

Every part is written to `--out` as soon as it is measured, and no part begins once `--minutes` are
over: run it again to go on. Times are of the processor, one thread, the slimmed network and the
dense one in turn. For latency, which depends on shapes alone, tickets are made on random images,
with noise on biases and running statistics, so that constants are there to be folded.

With `--seeds` tickets are trained too, at 32 px: `points_lost` is the accuracy of the ticket with
units 0 less that of the one with units, `vs_narrower_dense` that of the latter less that of the
widest dense network of the family whose latency is not above its own.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.core.config import run_id
from autosparse.core.files import read_json, write_json
from autosparse.criteria.pruning import DENSE, prune
from autosparse.data.config import DataConfig
from autosparse.models import zoo
from autosparse.models.config import ModelConfig
from autosparse.sparsity.slim import slim
from autosparse.study import grid, local
from autosparse.study.config import StudyConfig
from autosparse.study.export import dense_model
from autosparse.study.measure import costs, latencies, onnx_runner
from autosparse.training.config import TrainingConfig
from benchmarks.report import figure, options, publish

GOAL_SECONDS = 20
TRAIN_SIDE = 32
NARROWER = {
    "resnet18": {
        f"{width:g}": ModelConfig(
            "resnet18", {"channels": [int(width * each) for each in (64, 128, 256, 512)]}
        )
        for width in (0.125, 0.25, 0.375, 0.5, 0.75)
    },
    "mobilenetv2_100": {
        width: ModelConfig(f"mobilenetv2_{width.replace('.', '')}")
        for width in ("0.35", "0.50", "0.75")
    },
}
"""Model -> dense networks of its family by their width: the rivals."""
Part = dict[str, Any]


def made(config: ModelConfig, side: int) -> nn.Module:
    """Return a timm model whose biases and running statistics are no initial ones."""
    model = zoo.create(config, num_classes=1000, in_chans=3, image_size=side, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for each in model.parameters():
            if each.dim() == 1:
                each.add_(torch.randn(each.shape, generator=generator), alpha=0.1)
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_(0, 0.1, generator=generator)
    return model.eval()


def pruned(
    model: nn.Module, sparsity: float, criterion: str, units: float, side: int
) -> nn.Module | None:
    """Return the model with zeros where it is pruned; None where no path is left through it."""
    images = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        data = [(images, torch.arange(4))]
        ticket = prune(model, data, criterion, sparsity, units=units)
    return None if "dead" in ticket.card else dense_model(ticket)


@lru_cache(maxsize=1)
def dense_runner(name: str, side: int) -> Callable[[Tensor], Any]:
    """Return the dense network in ONNX Runtime."""
    found = onnx_runner(made(ModelConfig(name), side), torch.zeros(2, 3, side, side))
    if found is None:
        raise SystemExit("pip install 'autosparse[onnx]' first")
    return found[0]


def against_dense(name: str, model: nn.Module, side: int, runs: int) -> Part:
    """Return a network's latency over that of the dense one, run by run, and what it costs."""
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    found = onnx_runner(model, images)
    assert found is not None
    times = latencies({"dense": dense_runner(name, side), "it": found[0]}, images[:1], runs)
    ratios = [a / b for a, b in zip(times["it"], times["dense"], strict=True)]
    return {"ratios": ratios, "ms": times, **costs(model, images), "onnx_bytes": found[1]}


def slimmed(arguments: argparse.Namespace, name: str, ticket: dict[str, Any]) -> Part:
    """Measure a slimmed ticket; a dead one, of which but a constant is left, has no figure."""
    model = pruned(made(ModelConfig(name), arguments.side), **ticket, side=arguments.side)
    if model is None:
        return {"dead": True}
    images = torch.zeros(2, 3, arguments.side, arguments.side)
    return against_dense(name, slim(model, images), arguments.side, arguments.runs)


def slim_seconds(name: str, side: int) -> Part:
    """Time the slimming of a ticket of 2 %, tracing and the check of the logits included."""
    model = pruned(made(ModelConfig(name), side), 0.98, "erk", 0.0, side)
    assert model is not None
    started = time.perf_counter(), time.process_time()
    slim(model, torch.zeros(2, 3, side, side))
    return {
        "seconds": time.perf_counter() - started[0],
        "processor_seconds": time.process_time() - started[1],
    }


def accuracy(arguments: argparse.Namespace, model: ModelConfig, ticket: dict, seed: int) -> Part:
    """Train a ticket, or the dense network where `ticket` is empty; return its test accuracy."""
    data = DataConfig("digits", image_size=TRAIN_SIDE)
    if arguments.data:
        data = DataConfig("folder", root=str(arguments.data), image_size=TRAIN_SIDE)
    study = StudyConfig(
        model=model,
        data=data,
        criteria=[ticket.get("criterion", "snip")],
        sparsities=[ticket.get("sparsity", 0.0)],
        seeds=[seed],
        twins=[],
        units=ticket.get("units", 0.0),
        training=TrainingConfig(epochs=arguments.epochs, learning_rate=0.01),
        tracking=False,
        out=str(arguments.out / "trained"),
    )
    wanted = [cell for cell in grid.cells(study) if (cell.label == DENSE) != bool(ticket)]
    result = local.run_cell(wanted[0], local.load(study))
    return {"accuracy": 100 * result["test_accuracy"]}


class Parts:
    """What is measured, each part known by its file; nothing new begins after the time."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder, self.end = folder / "parts", time.monotonic() + 60 * minutes
        self.left: list[str] = []

    def get(self, name: str, settings: Any, measure: Callable[[], Part]) -> Part | None:
        """Return a part that is there or that there is time to measure."""
        path = self.folder / f"{name}-{run_id(TrainingConfig(), str(settings))}.json"
        if path.is_file():
            return read_json(path)
        if time.monotonic() > self.end:
            self.left.append(name)
            return None
        print(f"{name} …", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, measure())
        return read_json(path)


def named(ticket: dict[str, Any]) -> str:
    """Return a ticket's name: criterion, sparsity in per cent, and units."""
    return f"{100 * ticket['sparsity']:g}_{ticket['criterion']}_units_{ticket['units']:g}"


def trained(parts: Parts, arguments: argparse.Namespace, name: str, tickets: list[dict],
            ratios: dict[str, float], figures: dict) -> None:  # fmt: skip
    """Add what units cost in accuracy, and how they stand beside narrower dense networks."""

    def runs(label: str, model: ModelConfig, ticket: dict) -> list[float] | None:
        found = [
            parts.get(
                f"accuracy_{name}_{label}_seed{seed}",
                [arguments.epochs, str(arguments.data)],
                lambda seed=seed: accuracy(arguments, model, ticket, seed),
            )
            for seed in range(arguments.seeds)
        ]
        return None if None in found else [each["accuracy"] for each in found if each]

    for ticket in tickets:
        label = named(ticket)
        if label not in ratios or named({**ticket, "units": 0.0}) not in ratios:
            continue  # Not measured yet, or dead.
        ours = runs(label, ModelConfig(name), ticket)
        if ours is None or not ticket["units"]:
            continue
        plain = {**ticket, "units": 0.0}
        before = runs(named(plain), ModelConfig(name), plain)
        if before is not None:
            lost = [a - b for a, b in zip(before, ours, strict=True)]
            figures[f"points_lost_{label}_{name}"] = figure(lost, "points", "<= 1", "units 0")
        widths = [width for width in NARROWER.get(name, {}) if f"width_{width}" in ratios]
        quick = [width for width in widths if ratios[f"width_{width}"] <= ratios.get(label, 0)]
        if quick:
            narrow = runs(f"width_{quick[-1]}", NARROWER[name][quick[-1]], {})
            if narrow is not None:
                more = [a - b for a, b in zip(ours, narrow, strict=True)]
                key = f"vs_narrower_dense_{label}_{name}"
                figures[key] = figure(more, "points", "> 0", f"dense, width {quick[-1]}")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = options(__doc__)
    found.add_argument("--models", nargs="+", default=["resnet18", "mobilenetv2_100"])
    found.add_argument("--sparsities", nargs="+", type=float, default=[0.95, 0.98, 0.99])
    found.add_argument("--criteria", nargs="+", default=["autos"])
    found.add_argument("--units", nargs="+", type=float, default=[0.0, 0.5, 1.0])
    found.add_argument("--side", type=int, default=224, help="of the images, for latency")
    found.add_argument("--runs", type=int, default=9)
    found.add_argument("--export", default="resnet50", help="model whose slimming is timed")
    found.add_argument("--seeds", type=int, default=0, help="trainings; 0: latency alone")
    found.add_argument("--epochs", type=int, default=8)
    found.add_argument("--data", type=Path, help="folder with train/CLASS; by default digits")
    found.add_argument("--minutes", type=float, default=5.0, help="no part begins later")
    found.add_argument("--out", type=Path, default=Path("deploy"), help="folder for the parts")
    return found


def main() -> None:
    """Measure what is not there yet, and publish all that is."""
    arguments = parser().parse_args()
    parts, figures, sizes = Parts(arguments.out, arguments.minutes), {}, {}
    dead: list[str] = []
    settings, tickets = [arguments.side, arguments.runs], [
        {"criterion": criterion, "sparsity": sparsity, "units": units}
        for criterion in arguments.criteria
        for sparsity in arguments.sparsities
        for units in arguments.units
    ]  # fmt: skip
    if arguments.export:
        name, side = arguments.export, arguments.side
        found = parts.get(f"slim_{name}", [side], lambda: slim_seconds(name, side))
        for key, value in (found or {}).items():
            goal = f"< {GOAL_SECONDS}"
            figures[f"slim_export_{key}_{name}"] = figure([value], "s", goal, "none")
    for name in arguments.models:
        measures: dict[str, Callable[[], Part]] = {
            named(each): lambda name=name, each=each: slimmed(arguments, name, each)
            for each in tickets
        } | {
            f"width_{width}": lambda name=name, config=config: against_dense(
                name, made(config, arguments.side), arguments.side, arguments.runs
            )
            for width, config in NARROWER.get(name, {}).items()
        }
        ratios = {}
        for label, measure in measures.items():
            found = parts.get(f"{name}_{label}", settings, measure)
            if found is not None and "dead" in found:
                dead.append(f"{name} {label}")
            elif found is not None:
                key = f"onnx_latency_vs_dense_{label}_{name}"
                goal = "none" if label.startswith("width") else "<= 0.35 at 98 %"
                figures[key] = figure(found["ratios"], "of dense", goal, "dense ONNX")
                ratios[label], sizes[key] = figures[key]["value"], found
        if arguments.seeds:
            trained(parts, arguments, name, tickets, ratios, figures)
    publish(figures, __doc__, arguments, sizes=sizes, left=parts.left, dead=dead)
    if dead:
        print(f"dead, so without a figure: {', '.join(dead)}")
    if parts.left:
        print(f"{len(parts.left)} parts are left (from {parts.left[0]} on): run it again to go on")


if __name__ == "__main__":
    main()
