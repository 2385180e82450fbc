"""The notebook runs from top to bottom, and what it trains is worth more than chance."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import autosparse

ROOT = Path(autosparse.__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "first_ticket.ipynb"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook: Any = nbformat.read(NOTEBOOK, 4)
    client = nbclient.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    said = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    reached = {
        line.split()[0]: float(line.split()[1].rstrip("%"))
        for line in said.splitlines()
        if "parameters trained" in line
    }
    assert set(reached) == {"dense", "autos", "snip", "random"}
    assert reached["dense"] > 70 and reached["autos"] > 50
    assert "<All keys matched successfully>" in said
    assert (tmp_path / "first_ticket.pt").is_file()
