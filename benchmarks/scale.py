"""A cost model of compact training: checked on one and two ranks here, asked about 8 to 512 GPUs.

    python -m benchmarks.scale --json scale.json --docs docs

Measured (benchmarks/scale_ranks.py): timm's resnet18 at 32 px under DeepSpeed, ZeRO 1, gloo, 32
images and one thread per rank, dense and at 90, 95 and 98 % in turn. A step's seconds are taken to
be `fixed + per_value x trainable values + scatter`; the scatter's cost is fitted on scatters alone,
the other two, for each number of ranks, on the dense model and 90 %. 95 and 98 % are held out.

- `step_R_ranks_SS`: error of the step predicted at SS % sparsity on R ranks.
- `step_2_from_1_SS`: the same on two ranks, with nothing taken from two ranks' steps but the dense
  one: what values cost is taken from one rank, the network from collectives alone.
- `quiet_…`: these once more, all of it from the faster half of every set of runs: other jobs on the
  machine only ever make a run slower, and two ranks wait for the slower one.
- `optimizer_bytes_SS`, `allreduced_bytes_SS`, `checkpoint_bytes_SS`: bytes on two ranks, from the
  formulas of benchmarks/cost_model.py with nothing fitted.
- `allreduced_zero_N`, `checkpoint_zero_N`: bytes at 90 % under the other ZeRO stages.

`--docs` draws the predictions there; benchmarks/scale_figures.py.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autosparse.core.errors import RunFailed
from autosparse.core.files import read_json
from benchmarks import cost_model, shapes
from benchmarks.cost_model import Collective, Plan, Shape
from benchmarks.report import figure, options, publish
from benchmarks.scale_predictions import predictions

ROUNDS, RANKS = 11, (1, 2)
FITTED, HELD_OUT = (0.0, 0.9), (0.95, 0.98)
GOAL = "within 20 %"
Figures = dict[str, dict[str, Any]]


def measured(ranks: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """Run benchmarks.scale_ranks on so many ranks; return what rank 0 found."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        command = [sys.executable, "-m", "benchmarks.scale_ranks", folder, str(rounds)]
        place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        known = {**os.environ, **place, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        log = (Path(folder) / "log").open("w")
        started = [
            subprocess.Popen(
                command,
                env={**known, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=log,
            )
            for rank in range(ranks)
        ]
        if not _all_end_well(started):
            raise RunFailed((Path(folder) / "log").read_text()[-3000:])
        return read_json(Path(folder) / "rank0.json")


def _all_end_well(started: list[subprocess.Popen]) -> bool:
    """Wait for all processes; end the others as soon as one fails."""
    while None in (codes := [each.poll() for each in started]):
        if any(codes):
            break
        time.sleep(0.2)
    for each in started:
        each.kill()
        each.wait()
    return not any(each.returncode for each in started)


@dataclass(frozen=True)
class Line:
    """y = at_zero + slope x."""

    at_zero: float
    slope: float

    def __call__(self, x: float) -> float:
        return self.at_zero + self.slope * x


def line(points: Sequence[tuple[float, float]]) -> Line:
    """Return the line through two points, or the least-squares line through more."""
    slope, at_zero = statistics.linear_regression(*zip(*points, strict=True))
    return Line(at_zero, slope)


def median(found: dict[str, list[float]], sparsity: float) -> float:
    """Return the median seconds at a sparsity."""
    return statistics.median(found[str(sparsity)])


def scatter_line(found: dict[str, list[float]], shape: Shape) -> Line:
    """Return the seconds of scattering and gathering, by survivors."""
    return line([(cost_model.kept(shape, float(at)), median(found, float(at))) for at in found])


def step_line(steps: dict[str, list[float]], shape: Shape, scatter: Line) -> Line:
    """Return the seconds of a step without its scatter, by trainable values; from FITTED."""
    points = []
    for sparsity in FITTED:
        own = scatter(cost_model.kept(shape, sparsity)) if sparsity else 0.0
        points.append((cost_model.trainable(shape, sparsity), median(steps, sparsity) - own))
    return line(points)


def predicted_step(shape: Shape, sparsity: float, rest: Line, scatter: Line) -> float:
    """Return a step's predicted seconds."""
    own = scatter(cost_model.kept(shape, sparsity)) if sparsity else 0.0
    return rest(cost_model.trainable(shape, sparsity)) + own


def network_lines(found: dict[str, dict[str, list[float]]]) -> dict[str, Line]:
    """Return the seconds of each collective by the bytes of the whole tensor: latency and rate.

    Through the medians of the smallest and the largest size, as those in between weigh nothing.
    """
    lines = {}
    for kind, sizes in found.items():
        ends = sorted(int(size) for size in sizes)
        ends = (ends[0], ends[-1])
        lines[kind] = line([(size, statistics.median(sizes[str(size)])) for size in ends])
    return lines


def network_seconds(shape: Shape, sparsity: float, lines: dict[str, Line]) -> float:
    """Return what a ZeRO 1 step on two ranks communicates, in seconds."""
    plan = Plan(sparsity, stage=1, precision=cost_model.fp32(1))
    found: list[Collective] = cost_model.collectives(shape, plan)
    return sum(lines[each.kind](each.size) for each in found)


def from_one_rank(
    shape: Shape, sparsity: float, one: Line, found: dict[str, Any], scatter: Line
) -> float:
    """Return a step on two ranks: the dense one, less what fewer values save.

    ZeRO 1 halves a rank's part of the update, but the ranks share the memory that it is bound by,
    so a value costs what it costs one rank. The network's part is from collectives alone.
    """
    lines = network_lines(found["network"])
    fewer = cost_model.trainable(shape, 0.0) - cost_model.trainable(shape, sparsity)
    network = network_seconds(shape, 0.0, lines) - network_seconds(shape, sparsity, lines)
    own = scatter(cost_model.kept(shape, sparsity))
    return median(found["steps"], 0.0) - network - one.slope * fewer + own


def error(predicted: float, runs: Sequence[float], peer: str, goal: str = GOAL) -> dict[str, Any]:
    """Return a figure: by how many per cent the prediction is above what was measured."""
    return figure([100 * (predicted / each - 1) for each in runs], "% off", goal, peer)


def faster_half(found: Any) -> Any:
    """Return the same measurements with the slower half of every list of seconds left out."""
    if isinstance(found, list):
        return sorted(found)[: (len(found) + 1) // 2]
    if isinstance(found, dict):
        return {name: faster_half(each) for name, each in found.items()}
    return found


def step_figures(shape: Shape, found: dict[int, dict[str, Any]]) -> Figures:
    """Return the errors of predicted seconds."""
    figures: Figures = {}
    lines = {}
    for ranks in RANKS:
        steps = found[ranks]["steps"]
        scatter = scatter_line(found[ranks]["scatter"], shape)
        lines[ranks] = step_line(steps, shape, scatter)
        for sparsity in HELD_OUT:
            predicted = predicted_step(shape, sparsity, lines[ranks], scatter)
            name = f"step_{ranks}_ranks_{100 * sparsity:g}"
            figures[name] = error(predicted, steps[str(sparsity)], "measured steps")
    scatter = scatter_line(found[2]["scatter"], shape)
    for sparsity in (0.9, *HELD_OUT):
        predicted = from_one_rank(shape, sparsity, lines[1], found[2], scatter)
        name = f"step_2_from_1_{100 * sparsity:g}"
        figures[name] = error(predicted, found[2]["steps"][str(sparsity)], "measured steps")
    return figures


def byte_figures(shape: Shape, found: dict[int, dict[str, Any]]) -> Figures:
    """Return the errors of predicted bytes, all without fitting."""
    figures: Figures = {}
    for sparsity in HELD_OUT:
        real = found[2]["bytes"][str(sparsity)]
        for name, value, seen in predicted_bytes(shape, sparsity, 1, real):
            figures[f"{name}_bytes_{100 * sparsity:g}"] = error(value, [seen], "measured bytes")
    for stage, real in found[2]["stages"].items():
        for name, value, seen in predicted_bytes(shape, 0.9, int(stage), real):
            if name != "optimizer":
                figures[f"{name}_zero_{stage}"] = error(value, [seen], "measured bytes")
    return figures


def predicted_bytes(
    shape: Shape, sparsity: float, stage: int, real: dict[str, Any]
) -> list[tuple[str, float, float]]:
    """Return (name, predicted, measured) on two ranks. DeepSpeed's checkpoint has no masks."""
    plan = Plan(sparsity, stage, precision=cost_model.fp32(stage))
    values = cost_model.trainable(shape, sparsity)
    masks = shape.prunable / 8 if sparsity else 0.0
    moved = sum(each.size for each in cost_model.collectives(shape, plan))
    partition = plan.precision.optimizer * values / (2 if stage else 1)
    return [
        ("optimizer", partition, real["optimizer"]),
        ("allreduced", moved, sum(real["collectives"].values())),
        ("checkpoint", cost_model.checkpoint_bytes(shape, plan) - masks, real["checkpoint"]),
    ]


def main() -> None:
    """Measure here, check, predict."""
    parser = options(__doc__)
    parser.add_argument("--docs", type=Path, help="folder to draw the predictions into")
    arguments = parser.parse_args()
    shape = shapes.timm_shape("resnet18", 32, num_classes=10)
    found = {ranks: measured(ranks) for ranks in RANKS}
    quiet = step_figures(shape, {ranks: faster_half(each) for ranks, each in found.items()})
    figures = {
        **step_figures(shape, found),
        **{f"quiet_{name}": each for name, each in quiet.items()},
        **byte_figures(shape, found),
    }
    rows = predictions()
    if arguments.docs:
        from benchmarks.scale_figures import draw

        draw(arguments.docs)
    publish(
        figures, __doc__, arguments, measured={str(k): v for k, v in found.items()}, predicted=rows
    )


if __name__ == "__main__":
    main()
