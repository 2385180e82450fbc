"""`figures` and `report`: all that applies to a folder, and one page that needs nothing else."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from autosparse.cli import verbs
from autosparse.cli.arguments import guarded
from autosparse.core.errors import UsageError
from autosparse.core.files import read_json
from autosparse.data.sets import DataSource
from autosparse.irp.run import run_irp
from autosparse.models.config import ModelConfig
from autosparse.report import drawing
from autosparse.report import page as report
from autosparse.study import local, plan, table
from autosparse.study.config import SweepConfig
from tests.conftest import QUICK, SMALL_DIGITS, quick_irp
from tests.study.small import comparison, result, sweep


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, digits: DataSource) -> Path:
    """A sweep of one criterion at two sparsities, and a failed cell that has a strange name."""
    out = tmp_path_factory.mktemp("swept")
    config = SweepConfig(
        models=[ModelConfig("test_byobnet")], data=SMALL_DIGITS, criteria=["magnitude"],
        sparsities=[0.5, 0.8], seeds=[0], twins=["shuffled"], training=QUICK, out=str(out),
    )  # fmt: skip
    planned = plan.cells(config)
    for cell in planned[:-1]:
        local.run_cell(cell, digits)
    planned[-1].failed("a <b>strange</b> & bad loss")
    table.write_report(config, table.table(planned), planned)
    return out


class Page(HTMLParser):
    """Collects tags, what they point at, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "data")]

    def handle_data(self, data):
        self.text += data


def test_all_figures_of_a_sweep_are_drawn_from_its_folder(swept: Path):
    names = {path.name for path in drawing.draw(swept)}
    assert names == {"accuracy.png", "cost.png", "layers.png", "twins.png"}
    for name in names:
        assert (swept / "figures" / name).with_suffix(".csv").is_file()


def test_the_page_holds_everything_and_asks_for_nothing(swept: Path):
    path = report.write(swept)
    content = path.read_text()
    page = Page(content)
    assert "script" not in page.tags and "link" not in page.tags
    assert page.tags.count("img") == 4
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"url\(|@import|https?://", content)
    assert 'name="viewport"' in content
    rows = read_json(swept / SweepConfig.report)["rows"]
    for row in rows:
        assert f"{row['accuracy'] * 100:.1f}±{row['spread'] * 100:.1f}" in page.text
    said = "no twins (a verdict needs the shuffled twin and uniform random pruning): magnitude at"
    assert f"{said} 50, 80 %" in page.text
    assert "a <b>strange</b> & bad loss" in page.text, "escaped, so it is text"
    assert "train_limit: 300" in page.text
    assert "torch" in page.text


def test_a_comparison_has_its_page_too(tmp_path: Path, digits: DataSource):
    config = comparison(tmp_path, criteria=["magnitude"], seeds=[0])
    planned = plan.cells(config)
    for cell in planned:
        local.run_cell(cell, digits)
    table.write_report(config, table.table(planned), planned)
    assert drawing.kind_of(tmp_path) == drawing.STUDY
    page = Page(report.write(tmp_path).read_text())
    assert page.tags.count("img") == 4, "comparison, accuracy, cost, layers"
    assert (tmp_path / "comparison.png").is_file()


def test_models_of_one_name_have_figures_and_lines_of_their_own(tmp_path: Path):
    models = [ModelConfig("test_byobnet"), ModelConfig("test_byobnet", exclude=["head"])]
    config = sweep(tmp_path, models=models, criteria=["magnitude"], sparsities=[0.5], seeds=[0])
    planned = plan.cells(config)
    for number, cell in enumerate(planned):
        result(cell, 0.5 + number / 10)
    table.write_report(config, table.table(planned), planned)
    names = [path.name for path in drawing.draw(tmp_path)]
    first, second = planned[0].contest, planned[2].contest
    assert names == [
        f"test_byobnet-{contest}-{kind}.png"
        for contest in (first, second) for kind in ("accuracy", "cost")
    ]  # fmt: skip
    lines = report._best_lines(drawing.report_of(tmp_path)["rows"])
    assert [line.partition(":")[0] for line in lines] == [
        "test_byobnet at 0 % sparsity", "test_byobnet at 50 % sparsity",
        "test_byobnet (exclude ['head']) at 0 % sparsity",
        "test_byobnet (exclude ['head']) at 50 % sparsity",
    ]  # fmt: skip


def test_a_corpus_has_its_page_too(tmp_path: Path):
    run_irp(quick_irp(str(tmp_path)))
    page = Page(report.write(tmp_path).read_text())
    assert page.tags.count("img") == 3
    assert "1 finished IRP runs" in page.text and "test_byobnet" in page.text
    assert ". 199,256 weights with survival." in page.text


def test_figures_of_a_quickstart_are_drawn_from_its_study(tmp_path: Path, digits: DataSource):
    config = comparison(tmp_path / "study", criteria=["magnitude"], seeds=[0], twins=[])
    planned = plan.cells(config)
    for cell in planned:
        local.run_cell(cell, digits)
    table.write_report(config, table.table(planned), planned)
    names = [str(path.relative_to(tmp_path)) for path in drawing.draw(tmp_path)]
    assert names == [
        "accuracy.png", "study/figures/accuracy.png", "study/figures/cost.png",
        "study/figures/layers.png",
    ]  # fmt: skip


def test_what_cannot_be_drawn_is_named_in_a_line(tmp_path: Path, swept: Path, capsys):
    with pytest.raises(UsageError, match="no such file"):
        drawing.kind_of(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="holds no finished"):
        report.write(tmp_path)
    ticket = next(swept.glob("tickets/*.safetensors"))
    assert guarded(verbs.draw_figures, [str(ticket)]) == 2
    assert "is no AutoS file" in capsys.readouterr().err
