"""Pictures of sweeps: what is drawn where, read back from the axes and the CSVs."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import matplotlib
import pytest
from PIL import Image

from autosparse.core.errors import UsageError
from autosparse.report import style, sweep_figures, twin_figures


def row(label: str, sparsity: float, accuracy: float, **changes) -> dict:
    found = {
        "label": label, "sparsity": sparsity, "seeds": 2, "accuracy": accuracy, "spread": 0.05,
        "checkpoint_bytes": round(1000 * (1 - sparsity)), "step_seconds": 0.01,
    }  # fmt: skip
    return {**found, **changes}


ROWS = [row("dense", 0.0, 0.9), row("snip", 0.9, 0.7), row("snip", 0.5, 0.8), row("irp", 0.9, 0.85)]


@pytest.fixture()
def drawn(monkeypatch):
    """The figures, kept open for a look at their axes."""
    kept: list = []
    save = style.save

    def keep(figure, rows, path):
        kept.append(figure)
        return save(figure, rows, path)

    monkeypatch.setattr(sweep_figures, "save", keep)
    return kept


def written(path: Path) -> list[dict[str, str]]:
    with Image.open(path) as image:
        assert 500 < image.size[0] < 1700
    assert path.stat().st_size < 150_000
    with path.with_suffix(".csv").open() as file:
        return list(csv.DictReader(file))


def lines_of(axes) -> dict[str, tuple[list[float], list[float]]]:
    return {
        line.get_label(): (list(line.get_xdata()), [round(v, 6) for v in line.get_ydata()])
        for line in axes.get_lines()
    }


def test_accuracy_is_drawn_over_density_on_a_log_axis_dense_left(tmp_path: Path, drawn):
    path = sweep_figures.accuracy_against_density(ROWS, tmp_path / "a.png", "t")
    (axes,) = drawn[0].axes
    found = lines_of(axes)
    assert found["SNIP"] == ([0.5, pytest.approx(0.1)], [80, 70])
    assert found["IRP"][1] == [85]
    assert found["dense"][1] == [90, 90], "a line across"
    assert axes.get_xscale() == "log"
    left, right = axes.get_xlim()
    assert left > 0.5 and right < 0.1
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (round(band.min(), 6), round(band.max(), 6)) == (65, 85), "± the spread"
    assert [each["accuracy"] for each in written(path)] == ["0.9", "0.7", "0.8", "0.85"]


def test_labels_stand_beside_the_ends_of_lines(tmp_path: Path, drawn):
    sweep_figures.accuracy_against_density(ROWS, tmp_path / "a.png", "t")
    (axes,) = drawn[0].axes
    assert {text.get_text() for text in axes.texts} == {"dense: 90.0", "SNIP: 70.0", "IRP: 85.0"}
    assert not drawn[0].legends and axes.get_legend() is None
    heights = sorted(text.xyann[1] for text in axes.texts)
    bottom, top = axes.get_ylim()
    assert all(b - a > 0.069 * (top - bottom) for a, b in itertools.pairwise(heights))


def test_labels_beside_a_log_axis_are_apart_there_too():
    with style.panels() as (_, grid):
        axes = grid[0, 0]
        axes.set_yscale("log")
        axes.set_ylim(1, 100)
        style.labels_beside(axes, [(1, 10, "a", "red"), (1, 10, "b", "blue")], 0.1)
        low, high = sorted(text.xyann[1] for text in axes.texts)
    assert high / low == pytest.approx(100**0.1)
    assert high * low == pytest.approx(100)


@pytest.mark.filterwarnings("error")
def test_one_sparsity_is_drawn_without_a_warning(tmp_path: Path):
    one = [row for row in ROWS if row["sparsity"] in (0.0, 0.9)]
    sweep_figures.accuracy_against_density(one, tmp_path / "a.png", "t")
    sweep_figures.cost_against_density(one, tmp_path / "b.png", "t")


def test_a_criterion_has_its_colour_and_twins_have_none_of_a_criterion():
    own = {kind: colour for kind, (colour, *_) in twin_figures.TWIN_STYLE.items()}
    for kind in ("shuffled", "reinitialised", "inverted"):
        assert own[kind] not in style.COLOURS.values()
    assert own["erk"] == style.COLOURS["erk"] and own["uniform"] == style.COLOURS["uniform"]
    assert len(set(own.values())) == len(own)


def test_bytes_and_time_have_a_panel_each(tmp_path: Path, drawn):
    path = sweep_figures.cost_against_density(ROWS, tmp_path / "c.png", "t")
    size, time = drawn[0].axes
    assert lines_of(size)["SNIP"][1] == [0.5, 0.1], "kilobytes"
    assert lines_of(time)["SNIP"][1] == [10, 10], "milliseconds"
    assert lines_of(size)["dense"][1] == [1, 1]
    assert len(written(path)) == 4


def test_layers_are_in_order_and_seeds_taken_together(tmp_path: Path, drawn):
    tickets = [
        {"label": "snip", "sparsity": 0.5, "seed": 0, "layers": {"stem": 0.8, "head": 0.2}},
        {"label": "snip", "sparsity": 0.5, "seed": 1, "layers": {"stem": 0.6, "head": 0.4}},
        {"label": "erk", "sparsity": 0.5, "seed": 0, "layers": {"stem": 1.0, "head": 0.1}},
    ]
    path = sweep_figures.layer_densities(tickets, tmp_path / "l.png", "t")
    panels = {axes.get_title(): lines_of(axes)["50 %"] for axes in drawn[0].axes}
    assert panels["SNIP"] == ([1, 2], [0.7, 0.3])
    assert panels["ERK"] == ([1, 2], [1.0, 0.1])
    rows = written(path)
    assert [r["layer"] for r in rows if r["label"] == "snip"] == ["stem", "head"]


def test_every_label_looks_different_and_known_ones_the_same():
    names = ["snip", "autos", "grasp", "lamp", "mine", "another", "third", "px", "force"]
    found = style.looks(names)
    seen = {(look["color"], look["marker"], look["linestyle"]) for look in found.values()}
    assert len(seen) == len(names)
    assert found["snip"] == style.looks(["snip"])["snip"]


def test_nothing_sparse_is_said(tmp_path: Path):
    with pytest.raises(UsageError, match="nothing sparse"):
        sweep_figures.accuracy_against_density([ROWS[0]], tmp_path / "a.png", "t")
    with pytest.raises(UsageError, match="no tickets"):
        sweep_figures.layer_densities([], tmp_path / "l.png", "t")


def test_accuracy_over_flops_joins_the_best_at_their_cost(tmp_path: Path, drawn):
    def cost(flops: float, accuracy: float) -> dict:
        return {**row("snip", 0.9, accuracy), "training": "rigl", "training_flops": flops}

    rows = [cost(1e9, 0.6), cost(3e9, 0.5), cost(2e9, 0.7), {**ROWS[0], "training_flops": None}]
    path = sweep_figures.accuracy_against_flops(rows, tmp_path / "f.png", "t")
    assert [float(each["training_flops"]) for each in written(path)] == [1e9, 3e9, 2e9]
    axes = drawn[-1].axes[0]
    assert axes.get_xscale() == "log"
    frontier = axes.lines[-1]
    assert list(frontier.get_xdata()) == [1e9, 2e9]
    assert list(frontier.get_ydata()) == [60, 70]


def test_a_notebooks_own_figures_are_left_alone(tmp_path: Path, monkeypatch):
    from matplotlib import pyplot

    before = matplotlib.get_backend()
    pyplot.switch_backend("svg")
    try:
        sweep_figures.accuracy_against_density(ROWS, tmp_path / "a.png", "t")
        with pytest.raises(KeyError), style.panels():
            raise KeyError("drawing failed")
        assert matplotlib.get_backend() == "svg"
        assert pyplot.get_fignums() == []
    finally:
        pyplot.switch_backend(before)
