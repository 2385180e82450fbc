"""What the cost model predicts for docs/scale.md: three models, 8 to 512 GPUs, ZeRO 0 to 3.

    python -m benchmarks.scale_predictions [--docs docs/scale.md]

prints the tables of docs/scale.md, or writes them there. All of it is computed, nothing measured:
one NVIDIA A100 80 GB per rank, eight to a node, the nodes joined by 10, 100 or 400 Gbit/s.

Assumed, with sources: peak 312 TFLOP/s and 2039 GB/s (A100 datasheet); hops of 3.4 and 14 µs (NCCL
2.18's src/graph/tuning.cc, ring, Simple protocol); reached shares of the peak:

- resnet50: 2470 images/s on one A100 with mixed precision (NVIDIA DeepLearningExamples,
  PyTorch/Classification/ConvNets/resnet50v1.5) at 3 x 8.18 GFLOP each: 19 %.
- gpt_2.7b: 44 %, as Megatron-LM's 1.7 B and 3.6 B models (Narayanan et al. 2021, arXiv 2104.04473,
  table 1).
- vit_large_patch16_224: 40 %, by likeness to the transformers above; no source.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from autosparse.core.progress import print_table
from benchmarks import shapes
from benchmarks.cost_model import (
    GPU,
    Cluster,
    Plan,
    Shape,
    checkpoint_bytes,
    checkpoint_seconds,
    memory_bytes,
    network_bytes,
    network_seconds,
    step_seconds,
)

SPARSITIES = (0.0, 0.9, 0.95, 0.98)
GPUS = (8, 16, 32, 64, 128, 256, 512)
GIGABITS = (10, 100, 400)
STAGES = (0, 1, 2, 3)
Row = dict[str, Any]
"""One prediction."""
Table = list[dict[str, str]]


@dataclass(frozen=True)
class Case:
    """A model on a GPU."""

    shape: Shape
    gpu: GPU
    batch: int
    """Samples per GPU."""

    def plan(self, sparsity: float, stage: int = 1, **more: Any) -> Plan:
        return Plan(sparsity, stage, self.batch, **more)


@cache
def cases() -> tuple[Case, ...]:
    """Return the three models, with batches that fit 80 GB dense under ZeRO 0."""
    return (
        Case(shapes.resnet50(), GPU(efficiency=0.194), batch=256),
        Case(shapes.vit_large(), GPU(efficiency=0.40), batch=64),
        Case(shapes.gpt_2_7b(), GPU(efficiency=0.44), batch=4),
    )


def cluster(gpus: int, gigabits: float, **more: Any) -> Cluster:
    """Return GPUs in nodes of eight, joined by so many Gbit/s."""
    return Cluster(gpus, gigabits * 1e9 / 8, **more)


def predict(case: Case, plan: Plan, machines: Cluster) -> dict[str, float]:
    """Return a row: milliseconds, gigabytes."""
    parts = step_seconds(case.shape, plan, case.gpu, machines)
    hidden = step_seconds(case.shape, replace(plan, overlap=1.0), case.gpu, machines)
    memory = memory_bytes(case.shape, plan, machines.gpus)
    one_layer = memory_bytes(case.shape, replace(plan, kept_scratch=False), machines.gpus)
    return {
        **{f"{name}_ms": 1e3 * seconds for name, seconds in parts.items()},
        "step_overlapped_ms": 1e3 * hidden["step"],
        "network_gb": network_bytes(case.shape, plan, machines.gpus) / 1e9,
        "network_alone_ms": 1e3 * network_seconds(case.shape, plan, machines),
        **{f"{name}_gb": size / 1e9 for name, size in memory.items()},
        "memory_gb": sum(memory.values()) / 1e9,
        "memory_one_layer_gb": sum(one_layer.values()) / 1e9,
        "checkpoint_gb": checkpoint_bytes(case.shape, plan) / 1e9,
        "checkpoint_s": checkpoint_seconds(case.shape, plan, machines),
    }


def predictions() -> list[Row]:
    """Return every row: model x sparsity x GPUs x network x stage."""
    return list(_rows())


def _rows() -> Iterator[Row]:
    for case, stage, gigabits in product(cases(), STAGES, GIGABITS):
        for gpus, sparsity in product(GPUS, SPARSITIES):
            found = predict(case, case.plan(sparsity, stage), cluster(gpus, gigabits))
            yield {
                "model": case.shape.name,
                "zero": stage,
                "gbit_s": gigabits,
                "gpus": gpus,
                "sparsity": sparsity,
                **{name: float(f"{value:.4g}") for name, value in found.items()},
            }


def _select(rows: list[Row], case: Case, **wanted: Any) -> list[Row]:
    wanted |= {"model": case.shape.name}
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def step_table(case: Case, rows: list[Row]) -> Table:
    """Return steps under ZeRO 1: dense in ms, and how many times as fast the compact ones are."""
    table = []
    for gigabits, gpus in product(GIGABITS, (8, 64, 512)):
        dense, *sparse = _select(rows, case, zero=1, gbit_s=gigabits, gpus=gpus)
        entry = {"Gbit/s": str(gigabits), "GPUs": str(gpus)}
        for key, label in (("step_ms", "alone"), ("step_overlapped_ms", "overlapped")):
            entry[f"dense {label}, ms"] = f"{dense[key]:,.0f}"
            entry[f"90/95/98 % {label}"] = " / ".join(f"{dense[key] / r[key]:.2f}" for r in sparse)
        table.append(entry)
    return table


def memory_table(case: Case, rows: list[Row]) -> Table:
    """Return GB per GPU without activations: dense, compact, compact with one layer's scratch."""
    table = []
    for stage in STAGES:
        entry = {"ZeRO": str(stage)}
        for row in _select(rows, case, zero=stage, gpus=64, gbit_s=100):
            whole = row["memory_gb"] - row["activations_gb"]
            single = row["memory_one_layer_gb"] - row["activations_gb"]
            value = f"{whole:.2f}" if not row["sparsity"] else f"{whole:.2f} ({single:.2f})"
            entry[f"{100 * row['sparsity']:g} %"] = value
        entry["activations"] = f"{row['activations_gb']:.1f}"
        table.append(entry)
    return table


def traffic_table(case: Case, rows: list[Row]) -> Table:
    """Return GB sent per GPU and step by ZeRO stage, and the checkpoint of ZeRO 1, on 64 GPUs."""
    table = []
    for sparsity in SPARSITIES:
        found = _select(rows, case, sparsity=sparsity, gpus=64, gbit_s=100)
        sent = [f"{row['network_gb']:.3g}" for row in sorted(found, key=lambda row: row["zero"])]
        (one,) = (row for row in found if row["zero"] == 1)
        if sent[1] != sent[2]:
            raise ValueError("ZeRO 1 and 2 send different amounts: they need a column each")
        table.append({
            "sparsity": f"{100 * sparsity:g} %", "ZeRO 0, GB": sent[0],
            "ZeRO 1 and 2, GB": sent[1], "ZeRO 3, GB": sent[3],
            "checkpoint, GB": f"{one['checkpoint_gb']:.3g}",
            "written in, s": f"{one['checkpoint_s']:.3g}",
        })  # fmt: skip
    return table


TOGETHER = {"resnet50": 4096, "vit_large_patch16_224": 4096, "gpt_2.7b": 512}
"""Samples of all GPUs together where the batch does not grow with them."""


def strong_table(case: Case, _: list[Row]) -> Table:
    """Return steps at 98 %, 100 Gbit/s, ZeRO 1, a fixed batch divided among ever more GPUs."""
    table = []
    for gpus in (64, 256, 512):
        small = replace(case, batch=TOGETHER[case.shape.name] // gpus)
        machines = cluster(gpus, 100)
        dense = predict(small, small.plan(0.0), machines)
        sparse = predict(small, small.plan(0.98), machines)
        networks = [f"{each['network_alone_ms']:.1f}" for each in (dense, sparse)]
        table.append({
            "GPUs": str(gpus), "batch per GPU": str(small.batch),
            "compute + scatter, ms": f"{dense['compute_ms']:.1f} + {sparse['scatter_ms']:.1f}",
            "network dense → compact, ms": " → ".join(networks),
            "alone": f"{dense['step_ms'] / sparse['step_ms']:.2f}",
            "overlapped": f"{dense['step_overlapped_ms'] / sparse['step_overlapped_ms']:.2f}",
        })  # fmt: skip
    return table


TABLES = {
    "step": step_table, "strong": strong_table, "memory": memory_table, "traffic": traffic_table,
}  # fmt: skip
"""Name of a block of docs/scale.md -> the table that it has for each model."""


def markdown(name: str, rows: list[Row]) -> str:
    """Return a block of docs/scale.md: a table for each model, with its name above."""
    parts = []
    for case in cases():
        table = TABLES[name](case, rows)
        lines = [list(table[0]), ["---"] * len(table[0]), *(list(row.values()) for row in table)]
        parts += [f"**{case.shape.name}**", "\n".join(f"| {' | '.join(x)} |" for x in lines)]
    return "\n\n".join(parts)


def filled(page: str) -> str:
    """Return a page with every block between `<!-- predicted: NAME -->` and its end made anew."""
    rows = predictions()
    for name in TABLES:
        begin, end = f"<!-- predicted: {name} -->", "<!-- predicted: end -->"
        block = "\n\n".join((begin, markdown(name, rows), end))
        pattern = f"{begin}.*?{end}"
        page = re.sub(pattern, lambda _, block=block: block, page, flags=re.DOTALL)
    return page


def main() -> None:
    """Print the tables; write those of a page that is named."""
    parser = argparse.ArgumentParser("python -m benchmarks.scale_predictions")
    parser.add_argument("--docs", type=Path, help="page whose tables are to be made anew")
    page = parser.parse_args().docs
    if page is not None:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        return
    rows = predictions()
    for table, case in product(TABLES.values(), cases()):
        print_table(table(case, rows), title=case.shape.name)


if __name__ == "__main__":
    main()
