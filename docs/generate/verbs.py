"""Makes reference/verbs.md: what `autosparse` and every verb answer to --help.

Made anew at every build, so it cannot be older than the code.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from autosparse.cli.main import VERBS

TOP = """# Verbs

What `autosparse` and each of its verbs answer to `--help`, made when this site was built.
[Configuration](configuration.md) explains the same keys class by class.

"""


def help_of(*arguments: str) -> str:
    """Return what `autosparse ARGUMENTS --help` prints, 96 columns wide."""
    program = "from autosparse.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--help"],
        env={**os.environ, "COLUMNS": "96", "NO_COLOR": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.replace("\u200b", "").rstrip()


def page() -> str:
    """Return the whole page."""
    calls: list[tuple[str, ...]] = [()]
    for name, verb in VERBS.items():
        calls += [(name,), *((name, action) for action in verb.actions)]
    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(lambda call: help_of(*call), calls))
    sections = [
        f"## {' '.join(('autosparse', *call))}\n\n```text\n{text}\n```\n"
        for call, text in zip(calls, texts, strict=True)
    ]
    return TOP + "\n".join(sections)
