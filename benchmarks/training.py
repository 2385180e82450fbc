"""Sparse training on two ranks: step time, bytes sent, held and written, against masked-dense.

    python -m benchmarks.training --json training.json

timm's resnet18 at 32 px, batch 32 per rank, AdamW, ZeRO 1, two gloo ranks on this machine; random
tickets. The peers are the dense model in a bare DeepSpeed loop, and masks multiplied into dense
weights (torch.nn.utils.prune) in the same loop. `state_bytes_vs_floor_98` is the peak of resident
memory in training (with tiny images, the scratch of convolutions included), over dense weight
bytes + 1.5 x density x the rest of what dense training holds (gradients and two Adam moments,
shared by the ranks under ZeRO 1): with `training.rescatter`, and `_kept` without.

`rigl_…`: a topology that moves by RigL. One step in four of a measurement ends with an exchange;
its cost is counted once in 100 steps. The peer of `rigl_vs_masked_dense_rigl_98` multiplies masks
into dense weights, as public code does (masked_rigl.py), with as many exchanges. The peak of memory
is compared with that of the static ticket, outside updates, and with one (`_at_update`).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import figure, publish

RANKS, AT, DENSITY = 2, "0.98", 0.02
EVERY = 100
"""Steps between exchanges that figures are told for."""
WORKER = Path(__file__).with_name("training_ranks.py")


def launch(*arguments: str) -> None:
    """Run the worker on both ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    root = str(WORKER.parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(RANKS),
        "--master_port", port, "--log_level", "error", str(WORKER), *arguments,
    ]  # fmt: skip
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)


def figures_of(found: dict[str, Any], memory: dict[tuple[str, str], int]) -> dict[str, Any]:
    """Return the figures from what the ranks have measured."""
    seconds, other = found["seconds"], 4 * found["other"]

    def ratios(one: str, two: str) -> list[float]:
        return [a / b for a, b in zip(seconds[one], seconds[two], strict=True)]

    def share(kind: str) -> list[float]:
        return [found[kind][AT] / found[kind]["0"] / DENSITY]

    result = {
        "step_vs_masked_98": figure(ratios(AT, "masked"), "times", "<= 0.4", "masked-dense, 98 %"),
        "dense_vs_bare": figure(ratios("0", "bare"), "times", "<= 1.03", "bare DeepSpeed loop"),
        "allreduce_bytes_vs_density_98": figure(
            share("sent"), "times", "<= 1.05", "density x dense"
        ),
        "optimizer_bytes_vs_density_98": figure(
            share("optimizer"), "times", "<= 1.05", "density x dense"
        ),
        "checkpoint_vs_density_98": figure(
            [(found["written"][AT] - 3 * other) / found["written"]["0"] / DENSITY],
            "times",
            "<= 1.3",
            "density x dense; without what is not prunable",
        ),
    }
    for name in ("0.9", "0.95", "0.98", "0.99"):
        result[f"step_vs_dense_{name[2:].ljust(2, '0')}"] = figure(
            ratios(name, "0"), "times", "", "our dense step"
        )
    weights = 4 * found["prunable"]
    gradients_and_moments = weights + 2 * weights / RANKS
    floor = weights + 1.5 * DENSITY * gradients_and_moments
    floor_text = "dense weights + 1.5 x density x the rest"
    for name, how, goal in (("", "rescatter", "<= 1"), ("_kept", "keep", "")):
        result[f"state_bytes_vs_floor_98{name}"] = figure(
            [memory[AT, how] / floor], "times", goal, floor_text
        )
        result[f"state_bytes_vs_dense_98{name}"] = figure(
            [memory[AT, how] / memory["0", "keep"]], "times", "", "dense training"
        )
    result |= moving_figures(seconds, found["steps"], memory)
    result["rescatter_vs_kept_98"] = figure(
        ratios("rescatter", AT), "times", "", "a step that keeps scattered weights"
    )
    return result


def moving_figures(
    seconds: dict[str, list[float]], steps: int, memory: dict[tuple[str, str], int]
) -> dict[str, Any]:
    """Return the figures of topologies that move.

    Args:
        seconds: per step, means over `steps` steps of which one ends with an exchange.
        steps: of a measurement.
        memory: peaks, by sparsity and way.
    """

    def averaged(moving: str, still: str) -> list[float]:
        pairs = zip(seconds[moving], seconds[still], strict=True)
        return [b + steps * (a - b) / EVERY for a, b in pairs]

    ours, static = averaged("rigl", AT), seconds[AT]
    theirs = averaged("masked rigl", "masked")

    def ratios(some: list[float], others: list[float]) -> list[float]:
        return [a / b for a, b in zip(some, others, strict=True)]

    kept = memory[AT, "keep"]
    peer = "a static ticket, 98 %"
    return {
        "rigl_vs_static_98": figure(ratios(ours, static), "times", "<= 1.03", peer),
        "rigl_vs_masked_dense_rigl_98": figure(
            ratios(ours, theirs), "times", "<= 0.35", "masked-dense RigL, 98 %"
        ),
        "rigl_memory_vs_static_98": figure([memory[AT, "rigl"] / kept], "times", "<= 1.1", peer),
        "rigl_memory_vs_static_98_at_update": figure(
            [memory[AT, "update"] / kept], "times", "", peer
        ),
    }


def main() -> None:
    """Measure all of them."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        launch(folder)
        memory = {}
        cases = [("0", "keep"), *((AT, way) for way in ("keep", "rescatter", "rigl", "update"))]
        for case in cases:
            launch(folder, "memory", *case)
            path = out / f"memory-{'-'.join(case)}.json"
            memory[case] = json.loads(path.read_text())["peak"]
        found = json.loads((out / "measured.json").read_text())
    publish(figures_of(found, memory), __doc__)


if __name__ == "__main__":
    main()
