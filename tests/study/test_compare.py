"""compare: verdicts by hand, cells that are found again, and a small comparison for real."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from autosparse import criteria
from autosparse.cli.arguments import guarded, parse
from autosparse.cli.verbs import compare_tickets
from autosparse.core import locks
from autosparse.core.config import FIRST_DEFAULTS
from autosparse.core.errors import UsageError
from autosparse.core.files import read_json
from autosparse.corpus.store import is_finished
from autosparse.criteria import base, scoring
from autosparse.data.sets import DataSource
from autosparse.irp import run as irp
from autosparse.models.config import ModelConfig
from autosparse.sparsity import twins
from autosparse.study import compare
from autosparse.study.compare import Trial
from autosparse.study.config import CompareConfig
from autosparse.study.verdicts import paired, verdict
from tests.conftest import QUICK, SMALL_DIGITS, holder


def config(out: Path, **changes) -> CompareConfig:
    settings = {
        "model": ModelConfig("test_byobnet"),
        "data": SMALL_DIGITS,
        "criteria": ["snip", "magnitude"],
        "sparsities": [0.5],
        "seeds": [0, 1],
        "training": QUICK,
        "device": "cpu",
        "tracking": False,
        "out": str(out),
    }
    return CompareConfig(**{**settings, **changes})


def by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


# Verdicts


def test_the_interval_is_students():
    found = paired(by_seed(0.5, 0.7, 0.9), by_seed(0.4, 0.5, 0.6))
    # Differences 0.1, 0.2, 0.3: mean 0.2, sd 0.1; t(0.975, 2) = 4.303; half 0.2484.
    assert found["mean"] == pytest.approx(0.2)
    assert found["low"] == pytest.approx(0.2 - 0.24841, abs=1e-5)
    assert found["high"] == pytest.approx(0.2 + 0.24841, abs=1e-5)


def test_pairing_takes_out_what_seeds_have_in_common():
    hard, easy = by_seed(0.2, 0.5, 0.8), by_seed(0.25, 0.551, 0.849)
    assert paired(easy, hard)["low"] > 0
    assert paired(by_seed(0.849, 0.25, 0.551), hard)["low"] < 0


def test_seeds_that_only_one_has_do_not_count():
    assert paired({0: 0.5, 1: 0.6, 7: 0.0}, {0: 0.4, 1: 0.5, 8: 1.0})["seeds"] == 2


@pytest.mark.parametrize(
    ("ticket", "shuffled", "uniform", "expected"),
    [
        ((0.80, 0.81, 0.82), (0.70, 0.71, 0.72), (0.50, 0.52, 0.51), "selection matters"),
        ((0.70, 0.72, 0.71), (0.71, 0.70, 0.72), (0.50, 0.52, 0.51), "only allocation"),
        ((0.70, 0.72, 0.71), (0.71, 0.70, 0.72), (0.60, 0.80, 0.70), "neither"),
        ((0.60, 0.61, 0.62), (0.70, 0.71, 0.72), (0.50, 0.52, 0.51), "worse"),
        ((0.10, 0.11, 0.10), (0.10, 0.10, 0.11), (0.50, 0.52, 0.51), "worse"),
        ((0.80,), (0.70,), (0.50,), "one seed"),
    ],
)
def test_verdicts(ticket, shuffled, uniform, expected):
    assert verdict(by_seed(*ticket), by_seed(*shuffled), by_seed(*uniform)) == expected


def test_without_twins_there_is_no_verdict():
    assert verdict(by_seed(0.8, 0.9), None, by_seed(0.5, 0.5)) == "no twins"


# The plan


def test_the_plan_has_every_ticket_with_its_twins_and_baselines_once(tmp_path: Path):
    found = compare.trials(config(tmp_path, sparsities="0.5, 0.9", seeds="0,1,2"))
    # Per seed: dense; per sparsity 2 criteria with 3 twins each, ERK and uniform.
    assert len(found) == len(set(found)) == 3 * (1 + 2 * (2 * 4 + 2))
    assert Trial("snip", "shuffled", 0.9, 2) in found
    assert Trial("uniform", "ticket", 0.5, 0) in found


def test_a_baseline_among_the_criteria_is_trained_once(tmp_path: Path):
    found = compare.trials(config(tmp_path, criteria="erk,snip"))
    assert [each for each in found if each.label == "erk" and each.twin == "ticket"] == [
        Trial("erk", "ticket", 0.5, 0),
        Trial("erk", "ticket", 0.5, 1),
    ]
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criteria": ["snyp"]}, "unknown criterion 'snyp'.*'snip'"),
        ({"twins": ["shufled"]}, "unknown twin 'shufled'.*'shuffled'"),
        ({"sparsities": [1.0]}, "sparsity must be"),
        ({"sparsities": "0.9,x"}, "no list of floats"),
        ({"seeds": []}, "at least one"),
        ({"options": {"snap": {}}}, "unknown label in options 'snap'"),
        ({"options": {"snip": {"rounds": 3}}}, "unknown option of snip 'rounds'"),
        ({"criteria": ["irp"], "options": {"irp": {"leveis": 3}}}, "leveis"),
        ({"criteria": ["irp"], "options": {"irp": {"seed": 3}}}, "compare settles it"),
        ({"guard": "layers"}, "unknown guard 'layers'"),
        ({"allocation": "erq"}, "unknown criterion 'erq'"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(tmp_path: Path, changes, message):
    with pytest.raises(UsageError, match=message):
        compare.trials(config(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_criterions_defaults_make_its_cells(tmp_path: Path, monkeypatch):
    trial = Trial("iter_snip", "ticket", 0.5, 0)

    def name(**options) -> str:
        made = config(tmp_path, criteria=["iter_snip"], options={"iter_snip": options})
        return compare.folder_of(made, trial).name

    before = name()
    rounds = criteria.get("iter_snip").options["rounds"]
    assert name(rounds=rounds) == before != name(rounds=rounds + 1)
    function = criteria.get("iter_snip").function
    monkeypatch.setitem(function.__kwdefaults__, "rounds", rounds + 1)
    assert before != name() == name(rounds=rounds + 1)


def test_what_makes_a_cell_is_in_its_folders_name(tmp_path: Path):
    base, trial = config(tmp_path), Trial("snip", "ticket", 0.5, 0)
    changed = [
        replace(base, model=ModelConfig("test_resnet")),
        replace(base, training=replace(QUICK, learning_rate=0.1)),
        replace(base, scope="layer"),
        replace(base, allocation="erk"),
        replace(base, options={"snip": {"criterion": "grasp"}}),
        replace(base, scoring=replace(base.scoring, mode="eval")),
    ]
    folders = [compare.folder_of(each, trial).name for each in [base, *changed]]
    assert len(set(folders)) == len(folders)
    same = replace(base, device="auto", tracking=True, criteria=["snip"], seeds=[0])
    assert compare.folder_of(same, trial).name == folders[0]


# For real


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> CompareConfig:
    settings = config(tmp_path_factory.mktemp("comparison") / "out")
    compare_tickets(settings)
    return settings


def test_a_comparison_writes_table_figure_and_results(done: CompareConfig):
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


def test_finished_cells_are_not_trained_again(done: CompareConfig, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(compare, "train_cell", fail)
    monkeypatch.setattr(scoring, "score", fail)
    compare_tickets(done)


def test_a_cell_that_is_gone_is_the_only_one_that_is_trained(done: CompareConfig, monkeypatch):
    trial = Trial("magnitude", "inverted", 0.5, 1)
    path = compare.folder_of(done, trial) / "result.json"
    before = read_json(path)
    path.unlink()
    trained = []
    real = compare.train_cell
    monkeypatch.setattr(
        compare,
        "train_cell",
        lambda cell, *a, **k: trained.append(cell.name) or real(cell, *a, **k),
    )
    compare_tickets(done)
    assert trained == [trial.name]
    assert read_json(path)["test_accuracy"] == before["test_accuracy"]


def test_twins_have_the_tickets_budget_and_seed(done: CompareConfig):
    results = read_json(Path(done.out) / "comparison.json")["results"]
    sparse = [each for each in results if each["label"] != "dense"]
    assert len({each["kept"] for each in sparse}) == 1
    prints = {
        (each["label"], each["twin"]): each["fingerprint"] for each in sparse if each["seed"] == 0
    }
    assert prints["snip", "reinitialised"] == prints["snip", "ticket"]
    assert len({prints["snip", twin] for twin in ("ticket", "shuffled", "inverted")}) == 3


def test_the_table_fits_a_terminal(done: CompareConfig, capsys):
    compare_tickets(done)
    table = capsys.readouterr().out
    assert max(len(line) for line in table.splitlines() if "│" in line) <= 120
    assert "…" not in table


def test_irp_is_the_reference(tmp_path: Path, digits: DataSource):
    settings = config(
        tmp_path, criteria="irp,late", seeds=[0], twins=["shuffled", "inverted", "uniform"],
        options={
            "irp": {"levels": 1},
            "late": {"criterion": "irp", "levels": 1, "rewind_steps": 2},
        },
    )  # fmt: skip
    compare_tickets(settings)
    report = json.loads((tmp_path / "comparison.json").read_text())
    rows = {row["label"]: row for row in report["rows"]}
    # Level 0 is trained once: 3 steps of 100 images.
    assert rows["irp"]["image_passes"] == rows["late"]["image_passes"] == 300
    kept = {each["kept"] for each in report["results"] if each["label"] != "dense"}
    assert len(kept) == 1
    ticket = compare.ticket_of(settings, Trial("late", "shuffled", 0.5, 0), digits)
    assert ticket.card["rewind_steps"] == 2


def test_the_command_line(tmp_path: Path):
    parsed = parse(
        CompareConfig,
        ["--criteria", "snip,erk", "--sparsities", "0.9,0.95", "--seeds", "0,1"],
        "autosparse compare", None,
    )  # fmt: skip
    assert compare.labels(parsed) == ["snip", "erk"]
    assert compare.sparsities(parsed) == [0.9, 0.95]
    assert compare.seeds(parsed) == [0, 1]
    single = parse(CompareConfig, ["--sparsities", "0.9", "--seeds", "3"], "", None)
    assert (compare.sparsities(single), compare.seeds(single)) == ([0.9], [3])


def test_a_mistake_is_one_line(tmp_path: Path, capsys):
    from autosparse.cli.main import _main

    code = guarded(_main, ["compare", "--criteria", "snyp", "--out", str(tmp_path / "out")])
    assert code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# Side by side


def test_a_cell_waits_for_the_irp_run_that_another_makes(tmp_path: Path, digits, monkeypatch):
    monkeypatch.setattr(locks, "POLL", 0.02)
    settings = config(tmp_path, criteria="irp", seeds=[0], options={"irp": {"levels": 1}})
    run = irp.run_folder(compare._irp_config(settings, {"levels": 1}, 0.5, 0))
    with holder(run) as process, ThreadPoolExecutor(1) as pool:
        twin = Trial("irp", "shuffled", 0.5, 0)
        waiting = pool.submit(compare.ticket_of, settings, twin, digits)
        time.sleep(2)
        assert not waiting.done(), waiting.exception()
        process.kill()
        assert waiting.result(60).card["criterion"] == "irp"
    assert is_finished(run)


def test_cells_that_need_one_ticket_make_it_once(tmp_path: Path, digits, monkeypatch):
    monkeypatch.setattr(locks, "POLL", 0.02)
    settings, made = config(tmp_path), []
    real = compare._make
    monkeypatch.setattr(compare, "_make", lambda *given: made.append(1) or real(*given))
    trials = [Trial("magnitude", twin, 0.5, 0) for twin in ("ticket", "shuffled", "inverted")]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda trial: compare.ticket_of(settings, trial, digits), trials))
    assert len(made) == 1
    assert len({ticket.fingerprint for ticket in found}) == 3
    assert len(list((tmp_path / "tickets").iterdir())) == 2, "no claim is left"


def test_a_second_comparison_in_the_folder_is_told_of_the_first(tmp_path: Path):
    with holder(tmp_path / "out") as process:
        with pytest.raises(UsageError, match=f"being worked on by process {process.pid} "):
            compare_tickets(config(tmp_path / "out"))
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["claim.lock"]


def test_what_other_criteria_allocate_by_counts(tmp_path: Path, monkeypatch):
    trial, settings = Trial("snip", "ticket", 0.5, 0), config(tmp_path, allocation="iter_snip")
    before = compare.folder_of(settings, trial)
    monkeypatch.setitem(base.FIRST, "iter_snip", {"rounds": 1})
    assert compare.folder_of(settings, trial) != before


def test_an_irp_default_that_changes_makes_another_cell(tmp_path: Path, monkeypatch):
    trial, settings = Trial("irp", "ticket", 0.5, 0), config(tmp_path, criteria="irp")
    before = compare.folder_of(settings, trial)
    monkeypatch.setitem(FIRST_DEFAULTS, "IRPConfig.levels", 99)
    assert compare.folder_of(settings, trial) != before


def test_a_comparison_of_other_images_is_not_taken(done: CompareConfig, digits: DataSource):
    trial = Trial("snip", "ticket", 0.5, 0)
    assert compare.run_trial(done, trial, digits)["label"] == "snip"
    with pytest.raises(UsageError, match="is of other images"):
        compare.run_trial(done, trial, replace(digits, fingerprint="another"))
