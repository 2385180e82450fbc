"""Makes criteria/NAME.md for every criterion: formula, paper, cost, departures, options, example.

The table of docs/criteria.md and the docstring of the criterion's file are the sources; a formula
and an example worked out by hand come from docs/generate/criteria/NAME.md where there is one.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import autosparse
from autosparse import criteria

DOCS = Path(__file__).parents[1]
FORMULAS = Path(__file__).parent / "criteria"
CODE = Path(autosparse.__file__).parent / "criteria"
COLUMNS = ("score", "paper", "cost", "options", "departures")
ROW = re.compile(r"^\| `(\w+)` \|(.*)\|$", re.MULTILINE)


def rows() -> dict[str, dict[str, str]]:
    """Return criterion -> what its row in docs/criteria.md says."""
    found = {}
    for name, rest in ROW.findall((DOCS / "criteria.md").read_text(encoding="utf-8")):
        cells = [each.strip() for each in re.split(r"(?<!\\)\|", rest)]
        if len(cells) == len(COLUMNS):
            found[name] = dict(zip(COLUMNS, cells, strict=True))
    return found


def page(name: str, row: dict[str, str]) -> str:
    """Return the page of one criterion."""
    path = FORMULAS / f"{name}.md"
    said = ast.get_docstring(ast.parse((CODE / f"{name}.py").read_text(encoding="utf-8"))) or ""
    formula = path.read_text(encoding="utf-8") if path.exists() else f"{row['score']}\n"
    departures = row["departures"] if row["departures"] != "–" else "none"
    options = row["options"] if row["options"] != "–" else "none"
    facts = {
        "paper": row["paper"],
        "cost, in image passes": row["cost"],
        "options (defaults)": options,
        "where ours departs": departures,
    }
    return "\n".join([
        f"# {name}", "", "## Score: higher = keep", "", formula.strip(), "",
        "## At a glance", "", "| | |", "|---|---|",
        *(f"| {key} | {_linked(value)} |" for key, value in facts.items()), "",
        "`N` is the number of images that are scored, `n` the number of rounds. One image pass is",
        "a forward and a backward of one image. [All criteria side by side](../criteria.md).", "",
        "## What its file says", "", "``` { .text .wrap }", _flowing(said), "```", "",
        "## Use it", "", "```sh",
        f"autosparse prune --model.name resnet18 --criterion {name} --sparsity 0.9",
        "```", "",
    ])  # fmt: skip


def _flowing(text: str) -> str:
    """Return a docstring with every paragraph on one line, which the browser breaks."""
    return "\n\n".join(" ".join(each.split()) for each in text.split("\n\n"))


def _linked(text: str) -> str:
    return re.sub(r"\]\((?!http)([\w/]+\.md)", r"](../\1", text)


def pages() -> dict[str, str]:
    """Return every page by its path; every registered criterion has one."""
    known = rows()
    missing = sorted(set(criteria.names()) - set(known))
    if missing:
        raise ValueError(f"docs/criteria.md has no row for {', '.join(missing)}")
    return {f"criteria/{name}.md": page(name, known[name]) for name in criteria.names()}
