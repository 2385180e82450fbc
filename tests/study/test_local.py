"""Cells trained in this process: found again, made once, and a small comparison for real."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from autosparse.cli import studies
from autosparse.cli.arguments import guarded, parse
from autosparse.core import locks
from autosparse.core.errors import RunFailed, UsageError
from autosparse.core.files import read_json, write_json
from autosparse.corpus.store import is_finished
from autosparse.criteria import scoring
from autosparse.data.config import DataConfig
from autosparse.data.sets import DataSource
from autosparse.irp import run as irp
from autosparse.sparsity import twins
from autosparse.study import labels, local, plan, tickets
from autosparse.study.config import StudyConfig
from autosparse.study.grid import StudyCell
from autosparse.study.trainings import RESULT
from tests.conftest import QUICK, holder
from tests.data.test_data import write_mnist
from tests.study.small import comparison, result


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    settings = comparison(tmp_path_factory.mktemp("comparison") / "out")
    studies.run(settings)
    return settings


def test_a_comparison_writes_table_figure_and_results(done: StudyConfig):
    report = read_json(Path(done.out) / "comparison.json")
    assert [(row["label"], row["sparsity"]) for row in report["rows"]] == [
        ("dense", 0.0), ("snip", 0.5), ("magnitude", 0.5), ("erk", 0.5), ("uniform", 0.5),
    ]  # fmt: skip
    snip = report["rows"][1]
    assert set(snip["twins"]) == {*twins.TWINS, "erk", "uniform"}
    accuracies = [
        each["test_accuracy"]
        for each in report["results"]
        if (each["label"], each["twin"]) == ("snip", "ticket")
    ]
    assert snip["accuracy"] == pytest.approx(sum(accuracies) / 2)
    # 10 classes x 10 images; one epoch of 300 images in batches of 100.
    assert (snip["image_passes"], snip["cost_share"]) == (100, pytest.approx(100 / 300))
    png = (Path(done.out) / "comparison.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000


def test_finished_cells_are_not_trained_again(done: StudyConfig, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(local, "train_cell", fail)
    monkeypatch.setattr(scoring, "score", fail)
    studies.run(done)


def test_a_cell_that_is_gone_is_the_only_one_that_is_trained(done: StudyConfig, monkeypatch):
    cell = StudyCell(done, "magnitude", "inverted", 0.5, 1)
    path = cell.folder / "result.json"
    before = read_json(path)
    path.unlink()
    trained = []
    real = local.train_cell
    monkeypatch.setattr(
        local,
        "train_cell",
        lambda cell, *a, **k: trained.append(cell.name) or real(cell, *a, **k),
    )
    studies.run(done)
    assert trained == [cell.name]
    assert read_json(path)["test_accuracy"] == before["test_accuracy"]


def test_twins_have_the_tickets_budget_and_seed(done: StudyConfig):
    results = read_json(Path(done.out) / "comparison.json")["results"]
    sparse = [each for each in results if each["label"] != "dense"]
    assert len({each["kept"] for each in sparse}) == 1
    prints = {
        (each["label"], each["twin"]): each["fingerprint"] for each in sparse if each["seed"] == 0
    }
    assert prints["snip", "reinitialised"] == prints["snip", "ticket"]
    assert len({prints["snip", twin] for twin in ("ticket", "shuffled", "inverted")}) == 3


def test_the_table_fits_a_terminal(done: StudyConfig, capsys):
    studies.run(done)
    table = capsys.readouterr().out
    assert max(len(line) for line in table.splitlines() if "│" in line) <= 120
    assert "…" not in table


@pytest.mark.slow
def test_irp_is_the_reference(tmp_path: Path, digits: DataSource):
    settings = comparison(
        tmp_path, criteria="irp,late", seeds=[0], twins=["shuffled", "inverted", "uniform"],
        options={
            "irp": {"levels": 1},
            "late": {"criterion": "irp", "levels": 1, "rewind_steps": 2},
        },
    )  # fmt: skip
    studies.run(settings)
    report = json.loads((tmp_path / "comparison.json").read_text())
    rows = {row["label"]: row for row in report["rows"]}
    # Level 0 is trained once: 3 steps of 100 images.
    assert rows["irp"]["image_passes"] == rows["late"]["image_passes"] == 300
    kept = {each["kept"] for each in report["results"] if each["label"] != "dense"}
    assert len(kept) == 1
    ticket = tickets.ticket_of(StudyCell(settings, "late", "shuffled", 0.5, 0), digits)
    assert ticket.card["rewind_steps"] == 2


def test_the_command_line(tmp_path: Path):
    parsed = parse(
        StudyConfig,
        ["--criteria", "snip,erk", "--sparsities", "0.9,0.95", "--seeds", "0,1"],
        "autosparse compare", None,
    )  # fmt: skip
    assert labels.labels(parsed) == ["snip", "erk"]
    assert labels.sparsities(parsed) == [0.9, 0.95]
    assert labels.seeds(parsed) == [0, 1]
    single = parse(StudyConfig, ["--sparsities", "0.9", "--seeds", "3"], "", None)
    assert (labels.sparsities(single), labels.seeds(single)) == ([0.9], [3])


def test_a_mistake_is_one_line(tmp_path: Path, capsys):
    from autosparse.cli.main import _main

    code = guarded(_main, ["compare", "--criteria", "snyp", "--out", str(tmp_path / "out")])
    assert code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_dense_cells_of_a_study_have_no_topology_to_move(tmp_path: Path):
    training = replace(QUICK, topology="rigl", topology_every=1)
    settings = comparison(
        tmp_path / "out", criteria=["snip"], seeds=[0], twins=[], training=training
    )
    studies.run(settings)
    found = {each["label"]: each for each in read_json(tmp_path / "out/comparison.json")["results"]}
    assert "topology" not in found["dense"]
    assert [each["step"] for each in found["snip"]["topology"]["updates"]] == [1, 2], "of 3"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UsageError("the scores of\nstem are not finite"), "the scores of stem are not finite"),
        (RuntimeError("out of memory"), "RuntimeError: out of memory"),
    ],
)
def test_a_cell_that_cannot_be_does_not_hold_up_the_others(
    tmp_path: Path, monkeypatch, error: Exception, said: str
):
    settings = comparison(tmp_path / "out", seeds=[0], twins=[])
    make = tickets.scoring.score

    def refuse(model, source, name, *rest, **options):
        if name == "snip":
            raise error
        return make(model, source, name, *rest, **options)

    monkeypatch.setattr(tickets.scoring, "score", refuse)
    with pytest.raises(RunFailed, match="1 of 3 cells failed: snip-50"):
        studies.run(settings)
    report = read_json(tmp_path / "out/comparison.json")
    assert [each["label"] for each in report["results"]] == ["dense", "magnitude"]
    assert list(report["failed"].values()) == [said]


# Side by side


def test_a_cell_waits_for_the_irp_run_that_another_makes(tmp_path: Path, digits, monkeypatch):
    monkeypatch.setattr(locks, "POLL", 0.02)
    settings = comparison(tmp_path, criteria="irp", seeds=[0], options={"irp": {"levels": 1}})
    run = irp.run_folder(labels.irp_config(settings, {"levels": 1}, 0.5, 0))
    with holder(run) as process, ThreadPoolExecutor(1) as pool:
        twin = StudyCell(settings, "irp", "shuffled", 0.5, 0)
        waiting = pool.submit(tickets.ticket_of, twin, digits)
        time.sleep(2)
        assert not waiting.done(), waiting.exception()
        process.kill()
        process.wait()
        assert waiting.result(60).card["criterion"] == "irp"
    assert is_finished(run)


def test_cells_that_need_one_ticket_make_it_once(tmp_path: Path, digits, monkeypatch):
    monkeypatch.setattr(locks, "POLL", 0.02)
    settings, made = comparison(tmp_path), []
    real = tickets._make
    monkeypatch.setattr(tickets, "_make", lambda *given: made.append(1) or real(*given))
    cells = [
        StudyCell(settings, "magnitude", twin, 0.5, 0)
        for twin in ("ticket", "shuffled", "inverted")
    ]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda cell: tickets.ticket_of(cell, digits), cells))
    assert len(made) == 1
    assert len({ticket.fingerprint for ticket in found}) == 3
    assert len(list((tmp_path / "tickets").iterdir())) == 2, "no claim is left"


def test_a_second_comparison_in_the_folder_is_told_of_the_first(tmp_path: Path):
    with holder(tmp_path / "out") as process:
        with pytest.raises(UsageError, match=f"being worked on by process {process.pid} "):
            studies.run(comparison(tmp_path / "out"))
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["claim.lock"]


def test_a_comparison_of_other_images_is_not_taken(done: StudyConfig, digits: DataSource):
    cell = StudyCell(done, "snip", "ticket", 0.5, 0)
    assert local.run_cell(cell, digits)["label"] == "snip"
    with pytest.raises(UsageError, match="was made from different images"):
        local.run_cell(cell, replace(digits, fingerprint="another"))


def test_a_study_of_other_images_is_told_before_anything_is_trained(tmp_path: Path, monkeypatch):
    write_mnist(tmp_path / "mnist")
    monkeypatch.setenv("AUTOSPARSE_DATA", str(tmp_path / "mnist"))
    settings = comparison(tmp_path / "out", data=DataConfig("mnist", image_size=16), seeds=[0])
    cell = next(each for each in plan.cells(settings) if each.label == "snip")
    result(cell, 0.5)
    found = read_json(cell.folder / RESULT)
    write_json(cell.folder / RESULT, {**found, "data_fingerprint": "another"})
    monkeypatch.setattr(local, "train_cell", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(UsageError, match=rf"{cell.key} was made from .*\(fingerprint another"):
        studies.run(settings)


def test_a_ticket_of_other_images_is_not_taken(tmp_path: Path, digits: DataSource):
    """Left by a process that was killed before its cell was trained."""
    settings = comparison(tmp_path)
    for twin in ("ticket", "inverted"):
        cell = StudyCell(settings, "magnitude", twin, 0.5, 0)
        tickets.ticket_of(cell, digits)
        with pytest.raises(UsageError, match=r"tickets/magnitude\S+ was made from different"):
            tickets.ticket_of(cell, replace(digits, fingerprint="another"))


# Criteria that choose


def test_the_inverted_twin_of_a_choice_is_drawn_from_what_it_left_out(tmp_path: Path, digits):
    settings = comparison(tmp_path, criteria="autos", sparsities=[0.75])
    ticket, other = (
        tickets.ticket_of(StudyCell(settings, "autos", twin, 0.75, 0), digits)
        for twin in ("ticket", "inverted")
    )
    for name, mask in ticket.masks.items():
        count, theirs = int(mask.sum()), other.masks[name]
        assert int(theirs.sum()) == count
        assert int((theirs & mask).sum()) == max(2 * count - mask.numel(), 0), name
