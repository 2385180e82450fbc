"""The corpus's pictures: what their CSVs say, worked out by hand, and what cannot be drawn."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from autosparse.core.errors import UsageError
from autosparse.corpus.store import IRPRun
from autosparse.report import corpus_figures, style

Gradients = dict[str, Tensor]


def written(path: Path) -> list[dict[str, str]]:
    """Return the rows of the CSV beside a figure, which must be a picture."""
    with Image.open(path) as image:
        assert min(image.size) > 400
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 10
    with path.with_suffix(".csv").open() as file:
        return list(csv.DictReader(file))


def curve(run: int, accuracies: list[float]) -> list[dict]:
    """A run whose density halves at every level."""
    return [
        {
            "run_id": f"run{run}", "model": f"m{run % 12}", "data": "d", "seed": run // 12,
            "label": "magnitude", "level": level, "density": 0.5**level, "accuracy": accuracy,
        }
        for level, accuracy in enumerate(accuracies)
    ]  # fmt: skip


def made(levels: int, weight: Tensor, survival: Tensor) -> IRPRun:
    card = {"run_id": "made", "config": {"levels": levels}}
    return IRPRun({"a": weight}, {"a": survival.to(torch.uint8)}, {}, card)


def top_half(levels: int) -> tuple[IRPRun, Gradients]:
    """|w| = 1 to 20, of which 11 to 20 survive to the end; |gradient| = 20 to 1."""
    size = torch.arange(1.0, 21)
    sign = torch.tensor([1.0, -1.0]).repeat(10)
    run = made(levels, (size * sign).view(4, 5), (levels * (size > 10)).view(4, 5))
    return run, {"a": -(21 - size).view(4, 5)}


def filled(rows: list[dict[str, str]]) -> dict[tuple[int, int], tuple[int, float]]:
    """Return weights and mean survival by the bins' numbers."""
    assert len(rows) == 400
    assert all(row["mean_survival"] == "" for row in rows if row["weights"] == "0")
    return {
        (round(20 * float(row["weight_rank_from"])), round(20 * float(row["gradient_rank_from"]))):
        (int(row["weights"]), float(row["mean_survival"]))
        for row in rows if row["weights"] != "0"
    }  # fmt: skip


def test_level_curves_write_their_rows(tmp_path: Path) -> None:
    rows = [*curve(0, [0.9, 0.8]), *curve(12, [0.85, 0.7])]
    rows = [{**row, "not": "drawn"} for row in rows]
    path = corpus_figures.level_curves(rows, tmp_path / "a.png", "title")
    found = written(path)
    assert list(found[0]) == list(corpus_figures.COLUMNS)
    assert [(row["run_id"], row["level"], row["density"], row["accuracy"]) for row in found] == [
        ("run0", "0", "1.0", "0.9"), ("run0", "1", "0.5", "0.8"),
        ("run12", "0", "1.0", "0.85"), ("run12", "1", "0.5", "0.7"),
    ]  # fmt: skip
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.csv", "a.png"]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ([{}, {"model": "n"}], ["m", "n"]),
        ([{}, {"seed": 1}, {"model": "n"}], ["m, seed 0", "m, seed 1", "n"]),
        ([{}, {"label": "snip"}], ["m, magnitude", "m, snip"]),
        ([{}, {"model": "n", "data": "e"}], ["m, d", "n, e"]),
    ],
)
def test_curves_are_named_by_what_tells_them_apart(changes: list[dict], names: list[str]) -> None:
    first = {"model": "m", "data": "d", "seed": 0, "label": "magnitude"}
    heads = [{**first, **change} for change in changes]
    assert [corpus_figures._name(head, heads) for head in heads] == names


def test_twelve_models_look_different() -> None:
    drawn = []

    class Axes:
        def plot(self, *_, color, linestyle, marker, **__):
            drawn.append((color, linestyle, marker))

    corpus_figures._draw_named(Axes(), [curve(number, [0.9, 0.8]) for number in range(24)])
    assert len(set(drawn)) == 24
    assert len({(colour, line) for colour, line, _ in drawn}) == 12


def test_two_hundred_runs_become_median_and_quartiles(tmp_path: Path) -> None:
    rows = [row for number in range(200) for row in curve(number, [0.9, 0.8 - number / 1000])]
    rows += curve(200, [0.9, 0.8, 0.7])
    path = corpus_figures.level_curves(rows, tmp_path / "a.png", "title")
    assert len(written(path)) == 403


def test_the_median_goes_as_far_as_half_of_the_runs() -> None:
    lines, bands = {}, {}

    class Axes:
        def plot(self, x, y, label, **_):
            lines[label] = (x, y)

        def fill_between(self, x, low, high, label, **_):
            bands[label] = (low, high)

    runs = [curve(0, [0.5, 0.1]), curve(1, [0.6, 0.2]), curve(2, [0.9, 0.9, 0.9])]
    corpus_figures._draw_many(Axes(), runs)
    x, y = lines["median"]
    assert (min(x), max(x)) == (pytest.approx(0.5), 1.0)
    assert (y[0], y[-1]) == (pytest.approx(20), pytest.approx(60))
    low, high = bands["middle half"]
    assert (low[-1], high[-1]) == (pytest.approx(55), pytest.approx(75))


def test_survival_by_rank_of_weight_and_gradient(tmp_path: Path) -> None:
    path = corpus_figures.survival_map([top_half(3)], tmp_path / "a.png", "title")
    wanted = {(rank, 19 - rank): (1, float(rank >= 10)) for rank in range(20)}
    assert filled(written(path)) == wanted


def test_survival_is_the_mean_over_the_weights_of_all_runs(tmp_path: Path) -> None:
    """Two weights of the second run survive 1 of 4 levels; equal gradients share the mid rank."""
    run, gradients = top_half(2)
    other = made(4, torch.tensor([[1.0, -2.0]]), torch.ones(1, 2))
    pairs = [(run, {"a": torch.zeros_like(gradients["a"])}), (other, {"a": torch.ones(1, 2)})]
    found = filled(written(corpus_figures.survival_map(iter(pairs), tmp_path / "a.png", "title")))
    wanted = {(rank, 10): (1, float(rank >= 10)) for rank in range(20)}
    assert found == {**wanted, (5, 10): (2, 0.125), (15, 10): (2, 0.625)}


@pytest.mark.parametrize("gradient", [None, torch.ones(5, 4), torch.full((4, 5), torch.nan)])
def test_survival_needs_every_gradient(gradient: Tensor | None, tmp_path: Path) -> None:
    given = {} if gradient is None else {"a": gradient}
    with pytest.raises(UsageError, match="run made: a has no finite gradient"):
        corpus_figures.survival_map([(top_half(2)[0], given)], tmp_path / "a.png", "title")


def test_density_of_each_layer_at_each_level(tmp_path: Path) -> None:
    survival = {
        "one.weight": torch.tensor([[0, 1], [2, 2]], dtype=torch.uint8),
        "two.weight": torch.tensor([[0, 0, 0, 0, 1]], dtype=torch.uint8),
    }
    run = IRPRun({}, survival, {}, {"config": {"levels": 2}})
    found = written(corpus_figures.layer_densities(run, tmp_path / "a.png", "title"))
    assert [tuple(row.values()) for row in found] == [
        ("0", "one.weight", "4", "1.0"), ("0", "two.weight", "5", "1.0"),
        ("1", "one.weight", "3", "0.75"), ("1", "two.weight", "1", "0.2"),
        ("2", "one.weight", "2", "0.5"), ("2", "two.weight", "0", "0.0"),
    ]  # fmt: skip


def test_ticks_are_round() -> None:
    assert style.density_ticks(0.01) == {
        "ticks": pytest.approx([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]),
        "labels": ["1 %", "2 %", "5 %", "10 %", "20 %", "50 %", "100 %"],
    }
    assert style.density_ticks(1e-4)["labels"] == [
        "0.01 %", "0.1 %", "1 %", "10 %", "100 %"
    ]  # fmt: skip
    assert style.density_ticks(0.6)["labels"] == ["60 %", "80 %", "100 %"]


def test_nothing_to_draw_is_said_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(UsageError, match=r"no levels to draw.*at least one run"):
        corpus_figures.level_curves([], path, "title")
    with pytest.raises(UsageError, match=r"no weights to draw.*at least one run"):
        corpus_figures.survival_map(iter([]), path, "title")
    with pytest.raises(UsageError, match=r"no layers to draw.*no prunable parameter"):
        corpus_figures.layer_densities(IRPRun({}, {}, {}, {}), path, "title")
    assert not list(tmp_path.iterdir())
