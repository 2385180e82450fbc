"""The README's Python example runs, word for word."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import autosparse
from autosparse.sparsity.ticket import Ticket

README = Path(autosparse.__file__).parent.parent / "README.md"


def example() -> str:
    """Return the block of Python in the section "In Python"."""
    section = README.read_text().split("\n## In Python\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    return block


@pytest.mark.usefixtures("one_thread")
def test_the_python_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(example(), "README.md", "exec"), names)
    model, ticket = names["model"], names["ticket"]
    assert isinstance(model, nn.Module)
    assert ticket.sparsity == pytest.approx(0.95, abs=1e-6)
    (file,) = tmp_path.iterdir()
    assert Ticket.load(file).content_hash == ticket.content_hash
    decays = {group["weight_decay"]: group["params"] for group in names["optimizer"].param_groups}
    assert sum(each.numel() for each in decays[0.05]) == ticket.kept
    for name, mask in ticket.masks.items():
        assert int(model.get_parameter(name).count_nonzero()) <= int(mask.sum())
