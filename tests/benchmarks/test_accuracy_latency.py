"""The rows of the benchmark of accuracy over latency: what is trained for each."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.accuracy_latency import NETS, Table, asked, parser
from benchmarks.deploy import Parts


@pytest.mark.parametrize(
    ("label", "ticket"),
    [
        ("uniform_0.25", ("random", 1 - 1 / 16, 1.0)),  # A quarter of both sides of a layer.
        ("98_units_0.5", ("autos", 0.98, 0.5)),
        ("width_0.5", None),
        ("dense", None),
        ("torch_pruning_0.5", None),
    ],
)
def test_a_row_says_what_ticket_it_is(label: str, ticket: tuple | None) -> None:
    assert asked(label) == ticket


@pytest.mark.parametrize("net", NETS)
def test_every_row_is_a_training_of_its_own(net: str, tmp_path: Path) -> None:
    for side in (tmp_path / "train" / "cat", tmp_path / "train" / "dog"):
        side.mkdir(parents=True)
        (side / "1.png").write_bytes(b"")
    arguments = parser().parse_args(["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    table = Table(arguments, Parts(arguments.out, 0), net)
    rows = [label for label in table.labels if not label.startswith("torch")]
    cells = {label: table.cell(label, 1) for label in rows}
    assert len({cell.folder for cell in cells.values()}) == len(rows)
    assert cells["95_units_1"].config.units == 1
    assert cells["95_units_1"].config.training.slim
    assert not cells["95_units_0"].config.training.slim
    assert cells["dense"].label == cells["width_0.5"].label == "dense"
