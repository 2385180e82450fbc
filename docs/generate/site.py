"""The hook of mkdocs: adds the pages that are made from the code, and draws formulas.

Formulas between $$ become MathML, which browsers draw without a script or a network.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from mkdocs.structure.files import File, Files

from docs.generate import configuration, criteria, python, results, verbs

FENCED = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
FOUND_LAST = "---\nsearch:\n  boost: 0.0005\n---\n"
"""Written pages come first, then docstrings, though a match in a title weighs 1,000."""
CELL = re.compile(r"<t[dh]\b.*?</t[dh]>", re.DOTALL)
NAME = re.compile(r"<code>[^<]+</code>")
FIGURE = re.compile(r'(<img [^>]*src="([^"]+)"[^>]*>)')
FORMULA = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)


def on_config(config: Any) -> Any:
    """Name in the navigation what is generated: every criterion, package and experiment."""
    lists = {
        "Each criterion": [{Path(path).stem: path} for path in criteria.pages()],
        "Each experiment": [
            {each["title"]: f"results/{each['id']}.md"} for each in results.experiments()
        ],
        "Each package": [{Path(path).stem: path} for path in python.pages() if "python/" in path],
    }
    for tab in config.nav:
        for entries in tab.values():
            for entry in entries if isinstance(entries, list) else []:
                for name in lists.keys() & entry.keys():
                    entry[name] = lists[name]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made from the code."""
    pages = {
        "reference/configuration.md": configuration.page(),
        "reference/verbs.md": verbs.page(),
        **python.pages(),
        **criteria.pages(),
    }
    for path, text in pages.items():
        if path.startswith("reference/python/"):
            text = FOUND_LAST + text
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Return the page with every formula outside of code as MathML."""
    parts = FENCED.split(markdown)
    return "".join(
        part if place % 2 else FORMULA.sub(_mathml, _apart(part))
        for place, part in enumerate(parts)
    )


def on_page_content(html: str, **_: object) -> str:
    """Let long names in tables break after `_`, `.` and `/` only; link figures to their files."""
    html = FIGURE.sub(r'<a href="\2">\1</a>', html)
    return CELL.sub(lambda cell: NAME.sub(_breakable, cell[0]), html)


def on_post_page(output: str, page: Any, **_: object) -> str:
    """Let pages opened from disk find what search needs beside them, not on the network."""
    here = "../" * page.file.dest_uri.count("/")
    return output.replace("https://unpkg.com/iframe-worker/shim", f"{here}assets/iframe-worker.js")


def _apart(markdown: str) -> str:
    """Put an empty line before lists and tables that follow prose, as GitHub takes them."""
    lines: list[str] = []
    for line in markdown.split("\n"):
        before = lines[-1] if lines else ""
        prose = before.strip() and not before.startswith((" ", "-", "|", "#", "<"))
        if prose and line.startswith(("- ", "|")) and not _in_a_list(lines):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def _in_a_list(lines: list[str]) -> bool:
    """Whether the lines since the last empty one began as a list."""
    last = next((n for n in range(len(lines) - 1, -1, -1) if not lines[n].strip()), -1)
    return any(line.startswith("- ") for line in lines[last + 1 :])


def _breakable(name: re.Match[str]) -> str:
    return re.sub(r"(?<=[a-z0-9])([_./])(?=[a-z])", r"\1<wbr>", name[0][6:-7]).join(
        ("<code>", "</code>")
    )


def _mathml(found: re.Match[str]) -> str:
    """Return a formula; one that is no paragraph of its own stays inside its line."""
    from latex2mathml.converter import convert

    before, after = found.string[: found.start()], found.string[found.end() :]
    latex = " ".join(found[1].split())
    if before.endswith("\n\n") and (after.startswith("\n\n") or not after.strip()):
        return f'<div class="formula">{convert(latex, display="block")}</div>'
    return f"<span>{convert(latex)}</span>"
