"""One self-contained page of HTML: table, figures, verdicts, configs, environment."""

from __future__ import annotations

import base64
import html
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from autosparse.core.errors import UsageError
from autosparse.core.files import is_local, place, write_text
from autosparse.core.progress import as_text
from autosparse.core.versions import library_versions
from autosparse.corpus.store import Corpus, shown
from autosparse.report import drawing
from autosparse.study import table
from autosparse.study.config import StudyConfig

PAGE = "report.html"
Table = Sequence[dict[str, Any]]
LABELS = {
    "accuracy": "Test accuracy against density: mean, and a band of one standard deviation.",
    "twins": "Every ticket with its twins. Where the shuffled twin is as good, only the layer "
    "densities were worth something.",
    "cost": "What density buys: bytes of a trained ticket, and time of a training step "
    "(validation included).",
    "flops": "What accuracy costs: FLOPs of a whole training, each layer by its own density.",
    "layers": "How much each layer keeps, from input to output.",
    "levels": "Validation accuracy of every IRP run, level by level.",
    "survival": "Mean survival over the ranks of initial weight and gradient in the layer.",
}
LABELS["comparison"] = LABELS["twins"]
"""Caption of a figure, by the end of its file's name."""
MEANING = {
    "selection matters": "significantly above its shuffled twin (paired 95 % interval over seeds): "
    "which weights it keeps matters",
    "only allocation": "no better than its shuffled twin, which is significantly above uniform "
    "random pruning: only how many weights each layer keeps matters",
    "worse": "significantly below its shuffled twin, or below uniform random pruning",
    "neither": "no significant difference to its shuffled twin, nor of that to uniform random "
    "pruning",
    "one seed": "a verdict needs two seeds",
    "no twins": "a verdict needs the shuffled twin and uniform random pruning",
}


@dataclass
class Page:
    """The contents of a page, from top to bottom."""

    title: str
    summary: list[str]
    """Sentences."""
    tables: list[tuple[str, Table]]
    figures: list[Path]
    notes: list[tuple[str, list[str]]] = field(default_factory=list)
    """Headed lists of sentences."""
    configs: list[tuple[str, Any]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)


def write(path: str | Path) -> Path:
    """Draw the figures of a folder and write its page; return the page's path.

    The page needs no other file and no network.
    """
    kind = drawing.kind_of(path)
    makers = {drawing.STUDY: _study, drawing.CORPUS: _corpus}
    if kind not in makers:
        raise UsageError(f"{path}: a report is of a sweep, a comparison or a corpus")
    folder = place(path)
    page = makers[kind](folder, drawing.draw(path))
    out = folder / PAGE if is_local(folder) else Path(f"{folder.name}-{PAGE}")
    write_text(out, render(page))
    return out


def _study(folder: Path, figures: list[Path]) -> Page:
    report = drawing.report_of(folder)
    rows, config = report["rows"], report["config"]
    stopped = [f"{each['cell']}: after {each['epochs']} epochs" for each in report["stopped"]]
    failed = [f"{cell}: {error}" for cell, error in report["failed"].items()]
    counts = f"{len(report['results'])} cells finished"
    counts += f", {len(stopped)} stopped early" if stopped else ""
    counts += f", {len(failed)} failed" if failed else ""
    kind = "Comparison" if (folder / StudyConfig.report).is_file() else "Sweep"
    return Page(
        f"{kind} {folder.name}",
        [f"{counts}. Data: {config['data']['name']}.", *_best_lines(rows)],
        [("Results", list(table.shown(rows)))],
        figures,
        [("Verdicts of the controls", _verdict_lines(rows)),
         ("Stopped early", stopped), ("Failed", failed)],
        [("Settings", config)],
        _environment(report.get("versions", {})),
    )  # fmt: skip


def _corpus(folder: Path, figures: list[Path]) -> Page:
    corpus = Corpus(folder)
    rows, cards = corpus.table(), corpus.cards()
    weights = sum(row["prunable_weights"] for row in rows)
    summary = (
        f"{len(rows)} finished IRP runs, fingerprint {corpus.fingerprint}. {weights:,} weights "
        "with survival."
    )
    settings = {each["run_id"]: {**each["config"], "out": ""} for each in cards}
    return Page(
        f"Corpus {folder.name}",
        [summary],
        [("Runs", [shown(row) for row in rows])],
        figures,
        [],
        [("Settings of every run", settings)],
        _environment(cards[0].get("versions", {}) if cards else {}),
    )


def _best_lines(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Return a line per sparsity: the best criterion by validation accuracy, or dense."""
    lines = []
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    contests: dict[str, set[str]] = {}
    for row in rows:
        groups.setdefault((row["contest"], row["sparsity"]), []).append(row)
        contests.setdefault(row["model"], set()).add(row["contest"])
    for (_, sparsity), mine in groups.items():
        best = max(mine, key=lambda row: row["validation_accuracy"])
        model = best["model"] or ""
        if len(contests[best["model"]]) > 1 and best["training"]:
            model += f" ({best['training']})"
        what = f"{best['label']} is best" if best["label"] != "dense" else "dense"
        reached = f"{100 * best['accuracy']:.1f} ± {100 * best['spread']:.1f} % on the test split"
        name = f"{model} at " if model else "At "
        lines.append(f"{name}{100 * sparsity:g} % sparsity: {what}, {reached}.")
    return lines


def _verdict_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line per verdict: its meaning, and the criteria and sparsities it holds for."""
    places_of: dict[str, dict[str, list[str]]] = {}
    several = len({row.get("model") for row in rows}) > 1
    for row in rows:
        if row["verdict"]:
            extra = [row["model"]] if several else []
            extra += [row["training"]] if row.get("training") else []
            name = row["label"] + (f" ({', '.join(extra)})" if extra else "")
            mine = places_of.setdefault(row["verdict"], {}).setdefault(name, [])
            mine.append(f"{100 * row['sparsity']:g}")
    return [
        f"{verdict} ({MEANING[verdict]}): "
        + "; ".join(f"{name} at {', '.join(places)} %" for name, places in mine.items())
        for verdict, mine in places_of.items()
    ]


def _environment(made_with: dict[str, str]) -> dict[str, str]:
    now = library_versions()
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        **{name: made_with.get(name, version) for name, version in now.items()},
    }


STYLE = """
:root{color-scheme:light}
body{font:16px/1.5 system-ui,sans-serif;color:#1b1b1b;background:#fff;margin:0}
main{max-width:64rem;margin:auto;padding:1rem}
h1{font-size:1.6rem;margin:.5rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem}
.scroll{overflow-x:auto;-webkit-overflow-scrolling:touch;border:1px solid #ddd;border-radius:6px}
table{border-collapse:collapse;font-size:.85rem;width:100%;white-space:nowrap}
th,td{padding:.35rem .6rem;text-align:right;border-bottom:1px solid #eee}
th{background:#f5f5f5;position:sticky;top:0}
td.text,th.text{text-align:left}
tr:last-child td{border-bottom:0}
figure{margin:1rem 0;max-width:38rem}
.figures{display:grid;gap:1rem 2rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr))}
.note{font-size:.85rem;color:#555}img{max-width:100%;height:auto;display:block}
figcaption{font-size:.85rem;color:#555}
pre{overflow-x:auto;background:#f5f5f5;padding:.8rem;border-radius:6px;font-size:.8rem}
summary{cursor:pointer;color:#0072b2}li{margin:.2rem 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;font-size:.9rem}dd{margin:0}
a{color:#0072b2}
"""


def render(page: Page) -> str:
    """Return the page as HTML."""
    parts = [f"<h1>{html.escape(page.title)}</h1>", _list(page.summary)]
    parts += [_figure(path) for path in page.figures[:1]]
    for heading, rows in page.tables:
        parts += [f"<h2>{html.escape(heading)}</h2>", _table(rows), _columns(rows)]
    for heading, lines in page.notes:
        if lines:
            parts += [f"<h2>{html.escape(heading)}</h2>", _list(lines)]
    if page.figures[1:]:
        figures = "".join(_figure(path) for path in page.figures[1:])
        parts.append(f'<h2>Figures</h2><div class="figures">{figures}</div>')
    for heading, config in page.configs:
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        parts.append(f"<h2>{html.escape(heading)}</h2><details><summary>show</summary>"
                     f"<pre>{html.escape(text)}</pre></details>")  # fmt: skip
    parts += ["<h2>Environment</h2>", _pairs(page.environment)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(page.title)}</title><style>{STYLE}</style></head>"
        f"<body><main>\n{chr(10).join(parts)}\n</main></body></html>\n"
    )


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def _pairs(values: dict[str, str]) -> str:
    cells = "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in values.items()
    )
    return f"<dl>{cells}</dl>"


def _table(rows: Table) -> str:
    if not rows:
        return "<p>Nothing is finished yet.</p>"
    kinds = [
        "" if all(str(row[key])[:1].isdigit() or row[key] == "" for row in rows) else "text"
        for key in rows[0]
    ]
    head = _cells("th", rows[0].keys(), kinds)
    body = "".join(f"<tr>{_cells('td', row.values(), kinds)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>{body}</table></div>'


COLUMNS = {
    "at %": "sparsity in per cent",
    "accuracy": "mean test accuracy ± standard deviation over seeds, in per cent",
    "shuffle": "accuracy of the twin with its masks shuffled inside each layer",
    "reinit": "of the twin with weights drawn anew",
    "invert": "of the twin with the lowest scores",
    "erk": "of ERK",
    "unif.": "of uniform random pruning",
    "live": "weights on a path from input to output, in per cent",
    "passes": "images that went forward and backward to make the ticket",
    "cost": "these as a share of one training, in per cent",
}
"""Notes below a table on its columns."""


def _columns(rows: Table) -> str:
    said = [f"{name}: {COLUMNS[name]}" for name in (rows[0] if rows else {}) if name in COLUMNS]
    return f'<p class="note">{html.escape("; ".join(said))}.</p>' if len(said) > 2 else ""


def _cells(tag: str, values: Iterable[Any], kinds: list[str]) -> str:
    return "".join(
        f'<{tag} class="{kind}">{html.escape(as_text(value))}</{tag}>'
        for value, kind in zip(values, kinds, strict=True)
    )


def _figure(path: Path) -> str:
    """Return a figure with its caption and its data to save, all within the page."""
    image = base64.b64encode(path.read_bytes()).decode()
    kind = path.stem.rpartition("-")[2] if path.stem not in LABELS else path.stem
    caption = "Density of each layer at each level." if path.stem.startswith("layers-") else ""
    caption = caption or LABELS.get(kind, path.stem)
    data = ""
    if path.with_suffix(".csv").is_file():
        rows = base64.b64encode(path.with_suffix(".csv").read_bytes()).decode()
        name = html.escape(path.with_suffix(".csv").name)
        data = f' <a download="{name}" href="data:text/csv;base64,{rows}">data</a>'
    return (
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{image}">'
        f"<figcaption>{html.escape(caption)}{data}</figcaption></figure>"
    )
