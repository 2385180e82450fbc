"""One table of all stages: `python -m benchmarks.gpu.table FILE… [--json FILE] [--docs FILE]`.

Each file is what a stage wrote, or what this module wrote before. A later file's figures replace
those of an earlier one; all figures of a stage are of one machine. The standard library only: it
also runs where torch does not.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.gpu.goals import STAGES

MISSING = "not yet measured"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
HEADS = ("stage", "figure", "value", "spread", "unit", "goal", "met", "against")


def gathered(paths: list[Path]) -> dict[str, Any]:
    """Return stage -> what it wrote, from files that were written whole."""
    found: dict[str, Any] = {}
    for path in paths:
        content = json.loads(path.read_text(encoding="utf-8"))
        for name, stage in (content.get("stages") or {content["stage"]: content}).items():
            before = found.get(name)
            if before is None or before["machine"] != stage["machine"]:
                found[name] = stage
                continue
            parts = {part: {**before[part], **stage[part]} for part in ("figures", "notes")}
            found[name] = {**stage, **parts}
    return {name: found[name] for name in STAGES if name in found}


def met(value: float, goal: str) -> str:
    """Return yes or no, or nothing where there is no goal."""
    if not goal:
        return ""
    sign, _, number = goal.rpartition(" ")
    kept = {
        "<=": value <= float(number),
        ">=": value >= float(number),
        "<": value < float(number),
        "": value == float(number),
    }
    return "yes" if kept[sign] else "no"


def rows(stages: dict[str, Any], *, missing: bool) -> list[tuple[str, ...]]:
    """Return a row for every figure of goals.py; those not measured only if asked for."""
    found = []
    for stage, expected in STAGES.items():
        measured = stages.get(stage, {}).get("figures", {})
        for name, (unit, goal, peer) in expected.items():
            if name in measured:
                value, runs = measured[name]["value"], measured[name]["runs"]
                spread = f"{min(runs):.4g} to {max(runs):.4g}" if len(runs) > 1 else ""
                shown = (f"{value:.4g}", spread, unit, goal, met(value, goal), peer)
                found.append((stage, name, *shown))
            elif missing:
                found.append((stage, name, MISSING, "", unit, goal, "", peer))
    return found


def plain_table(lines: list[tuple[str, ...]]) -> str:
    """Return rows as text in columns, without what they are held against."""
    whole = [HEADS[:-1], *(line[:-1] for line in lines)]
    widths = [max(len(line[place]) for line in whole) for place in range(len(whole[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in whole
    )


def markdown(stages: dict[str, Any]) -> str:
    """Return the tables of docs/performance.md: one of six columns for each stage."""
    lines: list[str] = []
    heads = ("figure", "value", "spread", "goal", "met", "against")
    for name, found in groupby(rows(stages, missing=True), key=lambda row: row[0]):
        machine = told(stages[name]) if name in stages else MISSING
        lines += [f"### Stage {name}", "", f"Machine: {machine}.", ""]
        lines += [_line(heads), _line(["---"] * len(heads))]
        for _, figure, value, spread, unit, goal, reached, peer in found:
            shown = value if value == MISSING else f"{value} {unit}"
            lines.append(_line((f"`{figure}`", shown, spread, goal, reached, peer)))
        lines.append("")
    return "\n".join(lines[:-1])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def told(stage: dict[str, Any]) -> str:
    """Return on what a stage ran."""
    machine = stage["machine"]
    gpus = ", ".join(machine.get("gpus") or []) or f"{machine['processor']} (no GPU)"
    return f"{gpus}, {machine['cores']} cores, torch {machine['torch']}"


def put_into(path: Path, text: str) -> None:
    """Replace what lies between the marks of a page."""
    page = path.read_text(encoding="utf-8")
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{path} has no {BEGIN} … {END}")
    path.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Gather, print the table of what was measured, and write it where asked."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.table", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--json", type=Path, help="file to write everything to")
    parser.add_argument("--docs", type=Path, help="page whose table is to be drawn anew")
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    asked = parser.parse_args(arguments)
    stages = gathered(asked.files)
    if asked.json:
        temporary = asked.json.with_name(f".{asked.json.name}.tmp")
        temporary.write_text(json.dumps({"stages": stages}, indent=1), encoding="utf-8")
        temporary.replace(asked.json)
    if asked.docs:
        put_into(asked.docs, markdown(stages))
    if not asked.quiet:
        print(plain_table(rows(stages, missing=False)))


if __name__ == "__main__":
    main()
