"""What every benchmark shares: measuring in turn, the table, and the JSON file."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from autosparse.core.files import write_json
from autosparse.core.progress import print_table

RUNS = 5


def seconds_in_turn(jobs: dict[str, Callable[[], Any]], runs: int = RUNS) -> dict[str, list[float]]:
    """Time the jobs A B A B …, after one warm-up each; return the seconds of every run."""
    for job in jobs.values():
        job()
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(runs):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            taken[name].append(time.perf_counter() - started)
    return taken


def figure(runs: list[float], unit: str, goal: str, peer: str) -> dict[str, Any]:
    """Return one figure: the median of the runs, and all of them."""
    return {
        "value": statistics.median(runs),
        "unit": unit,
        "goal": goal,
        "peer": peer,
        "runs": runs,
    }


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in range(torch.cuda.device_count())],
    }


def options(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of what every benchmark understands."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser


def publish(
    figures: dict[str, dict[str, Any]],
    description: str | None,
    arguments: argparse.Namespace | None = None,
    **more: Any,
) -> None:
    """Print the figures; write them, and whatever more there is, to the file of `--json`."""
    arguments = arguments or options(description).parse_args()
    print_table(
        [
            {
                "figure": name,
                "value": f"{each['value']:,.3g}",
                "spread": f"{min(each['runs']):,.3g} to {max(each['runs']):,.3g}",
                "unit": each["unit"],
                "goal": each["goal"],
                "peer": each["peer"],
            }
            for name, each in figures.items()
        ]
    )
    if arguments.json:
        write_json(arguments.json, {"machine": machine(), "figures": figures, **more})
