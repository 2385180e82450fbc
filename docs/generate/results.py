"""Makes docs/results/ and tables of README.md and docs/, from the JSON in results/.

    python -m docs.generate.results

The pages are kept in the repository, so that they are read without a build; a test makes them
again and compares.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
VERDICTS = ("supported", "mixed", "refuted")
MOST_CLAIMS = 10
RESNET, EFFICIENT = "resnet10t-16/32/48/64", "test_efficientnet_ln"
UNSEEN = "seresnext26t_32x4d-16/32/48/64"
LATENCY = "accuracy_latency"
"""An experiment that no claim rests on; docs/slimming.md shows it."""
FILLED = ("README.md", "docs/autos.md", "docs/slimming.md")
"""Pages with blocks that are made from results/."""
NOTE = "<!-- made by docs/generate/results.py from results/*.json: do not edit -->"


def read(name: str) -> Any:
    """Return what results/NAME.json holds."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def claims() -> list[dict[str, Any]]:
    """Return all claims; raise ValueError for one that is not whole."""
    found = read("claims")
    if len(found) > MOST_CLAIMS:
        raise ValueError(f"{len(found)} claims, at most {MOST_CLAIMS} are read")
    for claim in found:
        if claim["verdict"] not in VERDICTS:
            raise ValueError(f"claim {claim['id']}: verdict {claim['verdict']!r}")
    return found


def experiments() -> list[dict[str, Any]]:
    """Return every experiment that a claim rests on, in the claims' order, and that of latency."""
    names = dict.fromkeys(name for claim in claims() for name in claim["experiments"])
    names[LATENCY] = None
    return [read(name) for name in names]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; at most six columns."""
    if len(head) > 6:
        raise ValueError(f"{len(head)} columns are too many to read: {head}")
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: dict[str, Any] | None) -> str:
    """Return a mean with its spread, and how many seeds where there is but one."""
    if value is None:
        return ""
    if "sd" in value:
        return f"{value['mean']:.1f} ± {value['sd']:.1f}"
    return f"{value['mean']:.1f}" + (" (1 seed)" if value["n"] == 1 else "")


def interval(claim: dict[str, Any]) -> str:
    """Return an interval with its unit and what it is."""
    found = claim["interval"]
    if found["low"] == "not recorded":
        return f"not recorded ({found['kind']})"
    return f"{found['low']} to {found['high']} {found['unit']}: {found['kind']}"


def bold(row: dict[str, Any]) -> str:
    """Return a row's name, AutoS's in bold."""
    return f"**{row['label']}**" if row["key"] == "autos" else row["label"]


def index() -> str:
    """Return the page of all claims."""
    rows = [
        [
            f"[{claim['statement']}](#{claim['id'].replace('_', '-')})",
            f"**{claim['verdict']}**", claim["n"], interval(claim),
        ]
        for claim in claims()
    ]  # fmt: skip
    titles = {each["id"]: each["title"] for each in experiments()}
    parts = [
        "# Results, as claims", NOTE, "",
        "What we say of autosparse, and how sure it is. *Supported*: it held wherever it was",
        "looked at. *Mixed*: it held in some places, or only on development nets. *Refuted*: it",
        "did not hold. A **development net** is one that a choice was made on (a default, a",
        "method): what it shows is a best case. A net is **held out** where no choice was made on",
        "it; its page says what of it had been seen by then. The [research log](log.md) has",
        "everything else, also what failed.", "",
        table(["claim", "verdict", "n", "interval"], rows),
    ]  # fmt: skip
    for claim in claims():
        links = ", ".join(f"[{titles[name]}]({name}.md)" for name in claim["experiments"])
        parts += [
            "", f'<a id="{claim["id"].replace("_", "-")}"></a>', "",
            f"## {claim['title']}", "",
            *wrapped(f"> {claim['statement']}", 2), "",
            *wrapped(f"**{claim['verdict'].capitalize()}.** {claim['evidence']}"), "",
            f"![{claim['title']}](claim_{claim['id']}.png)", "",
            *wrapped(f"- n: {claim['n']}", 2),
            *wrapped(f"- interval: {interval(claim)}", 2),
            *wrapped(f"- limits: {claim['limits']}", 2),
            *wrapped(f"- experiment: {links}", 2),
        ]  # fmt: skip
    return "\n".join(parts) + "\n"


def wrapped(text: str, indent: int = 0) -> list[str]:
    """Return lines of at most 100 characters."""
    import textwrap

    return textwrap.wrap(
        text, 99, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def tables_of(experiment: dict[str, Any]) -> list[str]:
    """Return the tables of an experiment's page, each with a line of its own before it."""
    if experiment["id"] == "short_trainings":
        return [short_95(), "", "Mean over 95, 98 and 99 %:", "", short_means()]
    if "columns" in experiment:
        return [table(experiment["columns"], experiment["rows"])]
    if experiment["id"] == LATENCY:
        return [latency_tables()]
    parts = []
    for name in experiment["nets"]:
        parts += [*net_heading(experiment, name), "", net_table(experiment, name), ""]
    return parts[:-1]


def net_heading(experiment: dict[str, Any], name: str) -> list[str]:
    """Return the line above a net's table: name, whether a choice saw it, dense accuracy."""
    net = experiment["nets"][name]
    dense = f"; dense {number(net['dense'])}" if "dense" in net else ""
    return wrapped(f"**{name}**, {net['seen']}{dense}:")


def net_table(experiment: dict[str, Any], name: str) -> str:
    """Return the table of one net: a row per criterion, a column per sparsity."""
    rows = experiment["nets"][name]["rows"]
    levels = sorted({level for row in rows for level in row["cells"]})
    means, costs = any("mean" in row for row in rows), any("cost_percent" in row for row in rows)
    head = ["row", *(f"{level} %" for level in levels)]
    head += ["mean"] * means + ["cost, of the training"] * costs
    lines = []
    for row in rows:
        line = [bold(row), *(number(row["cells"].get(level)) for level in levels)]
        line += [f"{row['mean']:.1f}" if "mean" in row else ""] * means
        line += [f"{row['cost_percent']:g} %" if "cost_percent" in row else ""] * costs
        lines.append(line)
    return table(head, lines)


def latency_tables() -> str:
    """Return the tables of accuracy over latency, one a net."""
    head = ["row", "test accuracy, %", "latency, of dense", "parameters", "ONNX file, kB"]
    parts = []
    for name, net in read(LATENCY)["nets"].items():
        rows = [
            [
                row["label"], number(row["accuracy"]),
                f"{row['of_dense']['mean']:.2f} ± {row['of_dense'].get('sd', 0):.2f}",
                f"{row['parameters']:,}",
                f"{row['onnx_bytes'] / 1000:,.0f}",
            ]
            for row in net["rows"]
        ]  # fmt: skip
        parts += [f"**{name}**, {net['seen']}:", "", table(head, rows), ""]
    return "\n".join(parts[:-1])


def short_95() -> str:
    """Return the table of short trainings at 95 %."""
    rows = [
        [
            f"**{row['label']}**" if row["bold"] else row["label"],
            number(row["cells"][RESNET]), number(row["cells"][EFFICIENT]), row["cost_passes"],
        ]
        for row in read("short_trainings")["rows_95"]
    ]  # fmt: skip
    head = ["row", f"{RESNET} (development net)", f"{EFFICIENT} (development net)",
            "cost of the ticket, image passes"]  # fmt: skip
    return table(head, rows)


def short_means() -> str:
    """Return the table of means over sparsities, on two nets and two data sets."""
    head = ["development nets", "resnet10t, CIFAR-10", "efficientnet_ln, CIFAR-10",
            "resnet10t, digits", "efficientnet_ln, digits", "mean"]  # fmt: skip
    rows = [[row["label"], *row["cells"]] for row in read("short_trainings")["means"]]
    return table(head, rows)


def experiment_page(experiment: dict[str, Any]) -> str:
    """Return the page of one experiment."""
    protocol = experiment["protocol"]
    written = "written before" if protocol["written_before"] else "not written before"
    seeds = experiment["seeds"]
    if isinstance(seeds, dict):
        seeds = "; ".join(f"{net}: {', '.join(map(str, each))}" for net, each in seeds.items())
    elif isinstance(seeds, list):
        seeds = ", ".join(map(str, seeds))
    facts = {
        "command": f"`{experiment['command']}`", "seeds": seeds, "data": experiment["data"],
        "data fingerprint": experiment["data_fingerprint"],
        "made by commit": experiment["commit"],
        "first recorded in commit": experiment["first_recorded_in"],
        "machine": experiment["machine"],
        "superseded by": experiment["superseded_by"] or "nothing",
    }  # fmt: skip
    return "\n".join([
        f"# {experiment['title']}", NOTE, "",
        *wrapped(f"**Question.** {experiment['question']}"), "",
        *wrapped(f"**Protocol** ({written}; [in the log's words]({protocol['link']})). "
                 f"{protocol['text']}"), "",
        "## Table", "", *wrapped(f"In {experiment['unit']}."), "", *tables_of(experiment), "",
        "## Choices made on it", "",
        *(line for each in experiment["choices"] for line in wrapped(f"- {each}", 2)),
        "", "## Limits", "",
        *(line for each in experiment["limits"] for line in wrapped(f"- {each}", 2)),
        "", "## How it was run", "",
        table(["what", "which"], [[key, str(value)] for key, value in facts.items()]), "",
    ])  # fmt: skip


def readme_table() -> str:
    """Return the README's table: means of the long trainings, and the net without choices."""
    long, unseen = read("long_trainings")["nets"], read("unseen_net")["nets"][UNSEEN]["rows"]
    first = {row["key"]: row for row in long[RESNET]["rows"]}
    second = {row["key"]: row for row in long[EFFICIENT]["rows"]}
    third = {row["key"]: row for row in unseen}
    rows = []
    for key in ("irp", "autos", "synflow", "snip", "short_irp", "lamp", "erk"):
        known = first.get(key) or second[key]
        both = (
            [third[key]["cells"][level]["mean"] for level in ("98", "99")] if key in third else []
        )
        rows.append([
            bold(known),
            *(f"{net[key]['mean']:.1f}" if "mean" in net.get(key, {}) else "not run"
              for net in (first, second)),
            f"{sum(both) / 2 + 1e-9:.1f}" if both else "not run",
            f"{known['cost_percent']:g} %",
        ])  # fmt: skip
    return table(
        ["criterion", f"{RESNET} (development net, 3 seeds)",
         f"{EFFICIENT} (development net, 1 seed)",
         "seresnext26t-16/32/48/64 (no choice made on it, 2 seeds)", "cost, of a training"], rows,
    )  # fmt: skip


def blocks() -> dict[str, str]:
    """Return what stands between the marks of the pages in `FILLED`."""
    long, left_out = read("long_trainings"), read("left_out")
    return {
        "readme": readme_table(),
        "left out": table(left_out["columns"], left_out["rows"]),
        "short": short_95(),
        "means": short_means(),
        "long resnet10t": net_table(long, RESNET),
        "long efficientnet": net_table(long, EFFICIENT),
        "latency": latency_tables(),
    }


def filled(text: str) -> str:
    """Return a page with every block between `<!-- results: NAME -->` and its end made anew."""
    for name, block in blocks().items():
        pattern = rf"(<!-- results: {name} -->\n).*?(\n<!-- results: end -->)"
        text = re.sub(
            pattern, lambda found, block=block: found[1] + block + found[2], text, flags=re.DOTALL
        )
    return text


def pages() -> dict[Path, str]:
    """Return every file that is made from results/, by its path."""
    results = ROOT / "docs" / "results"
    found = {results / "index.md": index()}
    found |= {results / f"{each['id']}.md": experiment_page(each) for each in experiments()}
    for path in (ROOT / name for name in FILLED):
        found[path] = filled(path.read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Write what is made from results/."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
