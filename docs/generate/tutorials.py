"""Runs the commands and the Python of docs/tutorials/, and writes what they printed beneath.

    python -m docs.generate.tutorials [NAME …]

A block marked `sh` or `python` is run; a `text` block right after it holds what it prints to
stdout, and of stderr the lines that say what is next. All blocks of a page run in one new folder,
in their order; Python blocks share their names.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "tutorials"
BLOCK = re.compile(
    r"^```(?P<kind>sh|python)\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
FROM_THE_TREE = ("configs", "launch", "ray_jobs")
WIDTH = "100"


@dataclass(frozen=True)
class Block:
    """A block that is run."""

    kind: str
    code: str
    output: str | None
    """What the page says it prints; None where it says nothing."""


def blocks(text: str) -> list[Block]:
    """Return the blocks of a page that are run."""
    return [Block(**found.groupdict()) for found in BLOCK.finditer(text)]


def alike(text: str) -> str:
    """Return a text without what differs from machine to machine: numbers, widths, colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = re.sub(r"[─━═┏┓┗┛┡┩┳╇┴┃│└┘]+", " ", text)
    text = re.sub(r"\b(?=[0-9a-f]*\d)[0-9a-f]{8,}\b|[-+±]?\d[\d,._]*(e[-+]?\d+)?", "#", text)
    return re.sub(r"[\s#%]+", " ", text).strip()


@contextlib.contextmanager
def folder_of_a_reader() -> Iterator[Path]:
    """Give a new folder with what a clone of the repository holds, and be in it."""
    with tempfile.TemporaryDirectory(prefix="tutorial-") as name:
        folder, before = Path(name), Path.cwd()
        for each in FROM_THE_TREE:
            (folder / each).symlink_to(ROOT / each)
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)


def run(text: str) -> Iterator[tuple[Block, str]]:
    """Run a page's blocks in a new folder; yield each with what it printed.

    Raises RuntimeError for a command that fails, with what it wrote to stderr.
    """
    names: dict[str, Any] = {"__name__": "tutorial"}
    with folder_of_a_reader() as folder, tempfile.TemporaryDirectory() as tools:
        program = Path(tools) / "autosparse"
        program.write_text(
            f"#!/bin/sh\nexec {sys.executable} -c "
            "'from autosparse.cli.main import main; main()' \"$@\"\n"
        )
        program.chmod(0o755)
        for block in blocks(text):
            if block.kind == "python":
                said = io.StringIO()
                with contextlib.redirect_stdout(said):
                    exec(compile(block.code, "tutorial", "exec"), names)
                yield block, said.getvalue()
            else:
                yield block, _shell(block.code, folder, tools)


def _shell(code: str, folder: Path, tools: str) -> str:
    errors = Path(tools) / "stderr"
    code = f"exec 2> >(tee {errors} | grep --line-buffered '^next: ')\n{code}"
    path = os.pathsep.join([tools, str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code], cwd=folder, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PATH": path, "COLUMNS": WIDTH, "NO_COLOR": "1",
             "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{code}\n{done.stdout[-2000:]}\n{errors.read_text()[-4000:]}")
    return done.stdout.replace(str(folder), "~")


def written(text: str) -> str:
    """Return a page with what its blocks print put beneath those that show it."""
    outputs = iter(list(run(text)))

    def with_output(found: re.Match[str]) -> str:
        block, said = next(outputs)
        page = f"```{block.kind}\n{block.code}```\n"
        return page if block.output is None else f"{page}\n```text\n{said.rstrip()}\n```\n"

    return BLOCK.sub(with_output, text)


def main(names: list[str]) -> None:
    """Run the pages of these names, or all, and write them."""
    for path in sorted(PAGES.glob("*.md")):
        if not names or path.stem in names:
            path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main(sys.argv[1:])
