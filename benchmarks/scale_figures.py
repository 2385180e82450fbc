"""The pictures of docs/scale.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autosparse.report.style import STYLE, labels_beside, save
from benchmarks.cost_model import memory_bytes
from benchmarks.scale_predictions import GIGABITS, GPUS, Case, cases, cluster, predict

TITLES = {
    "resnet50": "resnet50, 256 images per GPU",
    "vit_large_patch16_224": "ViT-L/16, 64 images per GPU",
    "gpt_2.7b": "2.7 B transformer, 4 x 2048 tokens per GPU",
}
DPI = 130
COLOURS = {10: "#D55E00", 100: "#0072B2", 400: "#009E73"}
PARTS = {"states": "#0072B2", "indices": "#E69F00", "scratch": "#CC79A7"}
BARS = ((0.0, True, "dense"), (0.9, True, "90 %"), (0.98, True, "98 %"), (0.98, False, "98 %*"))
"""Sparsity, whether all scattered weights are kept until backward, label."""


def draw(folder: Path) -> list[Path]:
    """Draw both pictures, each with its data as CSV beside it; return the PNGs."""
    import matplotlib

    matplotlib.use("Agg")
    return [draw_speed(folder / "scale_speed.png"), draw_memory(folder / "scale_memory.png")]


def speed_rows(sparsity: float = 0.95) -> list[dict[str, Any]]:
    """Return how many times as fast compact steps are than dense ones, ZeRO 1."""
    rows = []
    for case in cases():
        for gigabits in GIGABITS:
            for gpus in GPUS:
                machines = cluster(gpus, gigabits)
                dense = predict(case, case.plan(0.0), machines)
                sparse = predict(case, case.plan(sparsity), machines)
                row = {"model": case.shape.name, "gbit_s": gigabits, "gpus": gpus}
                for key in ("step_ms", "step_overlapped_ms"):
                    row[key.replace("_ms", "_speedup")] = round(dense[key] / sparse[key], 4)
                rows.append(row)
    return rows


def draw_speed(path: Path) -> Path:
    """Draw speed-up against GPUs, a panel per model."""
    from matplotlib import pyplot

    rows = speed_rows()
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(3, 1, figsize=(6.5, 9), layout="constrained")
        for axes, case in zip(panels, cases(), strict=True):
            for gigabits in GIGABITS:
                mine = [r for r in rows if (r["model"], r["gbit_s"]) == (case.shape.name, gigabits)]
                _draw_network(axes, mine, gigabits)
            axes.axhline(1, color="#444444", linewidth=1)
            axes.set_xscale("log", base=2)
            axes.set_xticks(GPUS, [str(each) for each in GPUS])
            axes.set_yscale("log")
            axes.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
            axes.set_ylim(0.9, 10)
            axes.minorticks_off()
            axes.set_title(TITLES[case.shape.name], fontsize=10)
            axes.set_ylabel("times as fast as dense")
            mine = [row for row in rows if row["model"] == case.shape.name]
            labels_beside(axes, [
                (row["gpus"], row[key], f"{row['gbit_s']} Gbit/s{what}", COLOURS[row["gbit_s"]])
                for row in mine
                if row["gpus"] == GPUS[-1]
                for key, what in (("step_speedup", ""), ("step_overlapped_speedup", ", hidden"))
            ], 0.09)  # fmt: skip
        panels[-1].set_xlabel("GPUs, eight to a node")
        figure.suptitle(
            "Predicted step at 95 % sparsity against dense, ZeRO 1\n"
            "(dashed: network hidden behind backward)",
            fontsize=11,
        )
        return save(figure, rows, path, DPI)


def _draw_network(axes: Any, rows: list[dict[str, Any]], gigabits: int) -> None:
    for key, line in (("step_speedup", "-"), ("step_overlapped_speedup", "--")):
        axes.plot(
            [row["gpus"] for row in rows], [row[key] for row in rows], line,
            color=COLOURS[gigabits], marker="o", markersize=3,
        )  # fmt: skip


def memory_rows(case: Case, gpus: int = 64) -> list[dict[str, Any]]:
    """Return GB per GPU by part, for the stages and BARS."""
    rows = []
    for stage in range(4):
        for sparsity, kept_scratch, label in BARS:
            plan = case.plan(sparsity, stage, kept_scratch=kept_scratch)
            found = memory_bytes(case.shape, plan, gpus)
            sizes = {part: round(found[part] / 1e9, 3) for part in PARTS}
            rows.append({"zero": stage, "weights": label, **sizes})
    return rows


def draw_memory(path: Path) -> Path:
    """Draw what the 2.7 B transformer holds on each of 64 GPUs, activations apart."""
    from matplotlib import pyplot

    rows = memory_rows(cases()[-1])
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(2, 2, figsize=(6.5, 6), layout="constrained")
        for stage, axes in enumerate(panels.flat):
            mine = [row for row in rows if row["zero"] == stage]
            base = [0.0] * len(mine)
            for part, colour in PARTS.items():
                sizes = [row[part] for row in mine]
                axes.bar(range(len(mine)), sizes, bottom=base, color=colour, label=part, width=0.7)
                base = [a + b for a, b in zip(base, sizes, strict=True)]
            _name_parts(axes, mine[1])
            axes.set_xticks(range(len(mine)), [row["weights"] for row in mine], fontsize=9)
            axes.set_title(f"ZeRO {stage}", fontsize=10)
            axes.grid(visible=False, axis="x")
            axes.set_ylabel("GB per GPU")
        figure.suptitle(
            "Predicted: 2.7 B transformer on 64 GPUs, without activations\n"
            "(* scattered again in backward)",
            fontsize=11,
        )
        return save(figure, rows, path, DPI)


def _name_parts(axes: Any, row: dict[str, Any]) -> None:
    """Write what each part is into the second bar, where there is room."""
    below, top = 0.0, axes.get_ylim()[1]
    for part in PARTS:
        if row[part] > 0.06 * top:
            axes.text(1, below + row[part] / 2, part, fontsize=8, ha="center", va="center")
        below += row[part]
