"""Every command and every block of Python in the tutorials runs, and prints what the page shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.generate import tutorials

PAGES = sorted(tutorials.PAGES.glob("*.md"))
QUICK = ["own_model"]


def check(path: Path) -> None:
    """Run a page; what it shows is what is printed, but for numbers and the width of tables."""
    ran = 0
    for block, said in tutorials.run(path.read_text(encoding="utf-8")):
        ran += 1
        if block.output is not None:
            assert tutorials.alike(block.output) == tutorials.alike(said), block.code
            assert block.output.strip(), "python -m docs.generate.tutorials"
    assert ran


@pytest.mark.parametrize("name", QUICK)
def test_a_quick_tutorial(name: str) -> None:
    check(tutorials.PAGES / f"{name}.md")


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("path", [p for p in PAGES if p.stem not in QUICK], ids=lambda p: p.stem)
def test_a_tutorial(path: Path) -> None:
    check(path)


def test_a_command_that_fails_is_told() -> None:
    with pytest.raises(RuntimeError, match="pruune"):
        list(tutorials.run("```sh\nautosparse pruune\n```\n"))


def test_what_differs_from_machine_to_machine_is_left_out() -> None:
    ours, theirs = (
        "│ a │ 0.52 │\nfingerprint b3bd113257e306e5",
        "│ a   │ 10.5e-3 │ fingerprint 77aa",
    )
    assert tutorials.alike(ours) == tutorials.alike(theirs.replace("77aa", "77aa77aa77aa"))
    assert tutorials.alike("12 kept") != tutorials.alike("12 lost")
