"""The cells of a study: which there are, and what names them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from autosparse import criteria
from autosparse.core.config import FIRST_DEFAULTS
from autosparse.core.files import write_json
from autosparse.criteria import base
from autosparse.models.config import ModelConfig
from autosparse.study import grid, labels, plan
from autosparse.study.config import StudyConfig
from autosparse.study.grid import StudyCell
from tests.conftest import QUICK
from tests.study.small import comparison, result, sweep


def test_the_plan_has_every_ticket_with_its_twins_and_baselines_once(tmp_path: Path):
    found = plan.cells(comparison(tmp_path, sparsities="0.5, 0.9", seeds="0,1,2"))
    # Per seed: dense; per sparsity 2 criteria with 3 twins each, ERK and uniform.
    assert len(found) == len({cell.key for cell in found}) == 3 * (1 + 2 * (2 * 4 + 2))
    places = [(cell.label, cell.twin, cell.sparsity, cell.seed) for cell in found]
    assert ("snip", "shuffled", 0.9, 2) in places
    assert ("uniform", "ticket", 0.5, 0) in places


def test_a_baseline_among_the_criteria_is_trained_once(tmp_path: Path):
    found = plan.cells(comparison(tmp_path, criteria="erk,snip"))
    mine = [cell for cell in found if cell.label == "erk" and cell.twin == "ticket"]
    assert [(cell.sparsity, cell.seed) for cell in mine] == [(0.5, 0), (0.5, 1)]
    assert len(found) == len({cell.key for cell in found})


def test_a_criterions_defaults_make_its_cells(tmp_path: Path, monkeypatch):
    def name(**options) -> str:
        made = comparison(tmp_path, criteria=["iter_snip"], options={"iter_snip": options})
        return StudyCell(made, "iter_snip", "ticket", 0.5, 0).key

    before = name()
    rounds = criteria.get("iter_snip").options["rounds"]
    assert name(rounds=rounds) == before != name(rounds=rounds + 1)
    function = criteria.get("iter_snip").function
    monkeypatch.setitem(function.__kwdefaults__, "rounds", rounds + 1)
    assert before != name() == name(rounds=rounds + 1)


def test_what_makes_a_cell_is_in_its_folders_name(tmp_path: Path):
    first = comparison(tmp_path)

    def key(config) -> str:
        return StudyCell(config, "snip", "ticket", 0.5, 0).key

    changed = [
        replace(first, model=ModelConfig("test_resnet")),
        replace(first, training=replace(QUICK, learning_rate=0.1)),
        replace(first, scope="layer"),
        replace(first, allocation="erk"),
        replace(first, options={"snip": {"criterion": "grasp"}}),
        replace(first, scoring=replace(first.scoring, mode="eval")),
    ]
    keys = [key(each) for each in [first, *changed]]
    assert len(set(keys)) == len(keys)
    same = replace(first, device="auto", tracking=True, criteria=["snip"], seeds=[0])
    assert key(same) == keys[0]


def test_what_other_criteria_allocate_by_counts(tmp_path: Path, monkeypatch):
    cell = StudyCell(comparison(tmp_path, allocation="iter_snip"), "snip", "ticket", 0.5, 0)
    before = cell.key
    monkeypatch.setitem(base.FIRST, "iter_snip", {"rounds": 1})
    assert cell.key != before


def test_an_irp_default_that_changes_makes_another_cell(tmp_path: Path, monkeypatch):
    cell = StudyCell(comparison(tmp_path, criteria="irp"), "irp", "ticket", 0.5, 0)
    before = cell.key
    monkeypatch.setitem(FIRST_DEFAULTS, "IRPConfig.levels", 99)
    assert cell.key != before


def test_the_cells_are_the_product_of_all_lists(tmp_path: Path):
    variations = [{}, {"learning_rate": 0.01}]
    models = [ModelConfig("test_byobnet"), ModelConfig("test_resnet")]
    found = plan.cells(sweep(tmp_path, models=models, variations=variations))
    # Per model, variation and seed: dense, and two criteria at two sparsities.
    assert len(found) == len({cell.key for cell in found}) == 2 * 2 * 2 * (1 + 2 * 2)
    assert {cell.config.training.learning_rate for cell in found} == {0.003, 0.01}


def test_a_cell_is_the_same_whichever_way_it_comes_in(tmp_path: Path):
    by_ray = plan.cells(sweep(tmp_path, twins=["shuffled"]))
    here = plan.cells(comparison(tmp_path, sparsities=[0.5, 0.8], twins=["shuffled"]))
    assert [cell.folder for cell in by_ray] == [cell.folder for cell in here]
    assert here[0].key == "dense-0-seed0-a31646a32dd5", "pinned: finished work is found by it"


def test_only_cells_of_one_model_sparsity_and_seed_compete(tmp_path: Path):
    found = plan.cells(sweep(tmp_path, asha=True, variations=[{}, {"learning_rate": 0.01}]))
    groups: dict = {}
    for cell in found:
        groups.setdefault(cell.group, []).append(cell)
    assert len(groups) == 2 * 3
    for mine in groups.values():
        assert len({(cell.sparsity, cell.seed) for cell in mine}) == 1
    assert sorted(len(mine) for mine in groups.values()) == [2, 2, 4, 4, 4, 4]


def test_what_became_of_a_cell_is_known_from_its_folder(tmp_path: Path):
    cell = plan.cells(sweep(tmp_path, asha=True))[1]
    assert (cell.state, cell.over) == ("to do", False)
    write_json(cell.folder / grid.FAILED, {"error": "no"})
    assert (cell.state, cell.over) == ("failed", False)
    write_json(cell.folder / grid.STOPPED, {"history": [{"epoch": 1}]})
    assert (cell.state, cell.over) == ("stopped", True)
    without = next(c for c in plan.cells(sweep(tmp_path)) if c.key == cell.key)
    assert not without.over, "without ASHA it is to be finished"
    result(cell, 0.5)
    assert (cell.state, cell.over) == ("finished", True)


def test_options_that_went_are_part_of_old_ids(tmp_path: Path):
    """Cells that earlier versions trained with short levels and SNIP are found again.

    Not AutoS's: transformers get another ticket by default now.
    """
    settings = StudyConfig(criteria="autos,autos_irp,short_irp,snip", out=str(tmp_path))
    names = labels.labels(settings)
    assert [StudyCell(settings, label, "ticket", 0.9, 0).key for label in names] == [
        "autos-90-seed0-18d2d51e0c29",
        "autos_irp-90-seed0-74831e98d39e",
        "short_irp-90-seed0-690f492bf928",
        "snip-90-seed0-d03af14dccac",
    ]


def test_an_axis_is_any_dotted_setting(tmp_path: Path):
    axes = {"training.optimizer_options.momentum": [0.8, 0.9], "options.fast.rounds": [2, 3],
            "data.train_limit": [200, 300], "model.name": ["test_vit", "test_resnet"]}  # fmt: skip
    settings = comparison(
        tmp_path, criteria=["fast"], options={"fast": {"criterion": "synflow"}}, seeds=[0],
        twins=[], axes=axes, training=replace(QUICK, optimizer="momentum"),
    )  # fmt: skip
    found = plan.cells(settings)
    tickets = [cell for cell in found if cell.label == "fast"]
    assert len(tickets) == len({cell.key for cell in tickets}) == 2**4
    last = tickets[-1].config
    assert last.training.optimizer_options == {"momentum": 0.9}
    assert last.options["fast"] == {"criterion": "synflow", "rounds": 3}
    assert (last.data.train_limit, last.model.name) == (300, "test_resnet")
    dense = [cell for cell in found if cell.label == "dense"]
    assert len(dense) == 2**3, "the rounds of a criterion make no other dense network"


def test_axes_and_variations_are_tried_with_each_other(tmp_path: Path):
    settings = comparison(
        tmp_path, variations=[{}, {"weight_decay": 0.1}], axes={"training.epochs": [1, 2]}
    )
    trainings = {
        (cell.config.training.weight_decay, cell.config.training.epochs)
        for cell in plan.cells(settings)
    }
    assert trainings == {(0.05, 1), (0.05, 2), (0.1, 1), (0.1, 2)}
    by_key = comparison(tmp_path, axes={"training.epochs": [2]})
    plain = comparison(tmp_path, training=replace(QUICK, epochs=2))
    assert [c.key for c in plan.cells(by_key)] == [c.key for c in plan.cells(plain)]
