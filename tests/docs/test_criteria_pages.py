"""The pages of criteria: one each, and every example worked out by hand runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from autosparse import criteria
from docs.generate import criteria as pages

EXAMPLES = sorted(pages.FORMULAS.glob("*.md"))


def test_every_criterion_has_a_page_with_a_formula() -> None:
    found = pages.pages()
    assert set(found) == {f"criteria/{name}.md" for name in criteria.names()}
    assert "$$" in found["criteria/snip.md"] and "1810.02340" in found["criteria/snip.md"]


def test_every_criterion_has_a_formula_and_an_example() -> None:
    assert {path.stem for path in EXAMPLES} == set(criteria.names())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_worked_out_by_hand(path: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
    assert "assert" in block
    exec(compile(block, str(path), "exec"), {})
