"""Pruning together on two gloo ranks: one ticket everywhere, the scores of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from autosparse import criteria
from autosparse.autos.network import AutoS
from autosparse.core.files import write_json
from autosparse.study.cells import RESULT, cells
from tests.criteria.test_pruning import close_to_rounding
from tests.integration.cells_on_ranks import configs, told
from tests.integration.prune_on_ranks import CASES, failure, scores_of, tickets
from tests.integration.ranks import Group

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def found(group: Group, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    path = tmp_path_factory.mktemp("ranks") / "autos.safetensors"
    torch.manual_seed(0)
    AutoS("context").save(path)
    return group.call(tickets, str(path))


@pytest.fixture(scope="module")
def scores(group: Group) -> dict[str, list[Any]]:
    return {" ".join(case): group.call(scores_of, *case) for case in CASES}


@pytest.mark.parametrize("criterion", [*criteria.names(), "own batches"])
def test_every_rank_has_the_same_ticket(found: list[dict], criterion: str) -> None:
    first, second = (each[criterion] for each in found)
    assert first == second


def test_criteria_do_not_all_have_the_same_ticket(found: list[dict]) -> None:
    assert len(set(found[0].values())) == len(criteria.names()) + 1


@pytest.mark.parametrize(
    ("criterion", "scoring"),
    [pytest.param(*case, id=" ".join(case)) for case in CASES],
)
def test_scores_are_those_of_one_process(scores: dict, criterion: str, scoring: str) -> None:
    first, second = (each[0] for each in scores[f"{criterion} {scoring}"])
    expected = scores_of(None, criterion, scoring)[0]
    assert list(first) == list(expected)
    for name, score in expected.items():
        assert torch.equal(first[name], second[name])
        close_to_rounding(first[name], score)


@pytest.mark.parametrize(
    ("criterion", "scoring"),
    [
        ("snip", "one batch"),
        ("fisher", "one batch"),
        ("iter_snip", "one batch"),
        ("snip", "warm, even"),
    ],
)
def test_the_cost_is_that_of_all_ranks(scores: dict, criterion: str, scoring: str) -> None:
    first, second = (each[1] for each in scores[f"{criterion} {scoring}"])
    assert first == second == scores_of(None, criterion, scoring)[1]


@pytest.mark.parametrize(
    "criterion",
    ["magnitude", "snip"],
)
def test_another_model_on_a_rank_fails_on_every_rank(group: Group, criterion: str) -> None:
    for said in group.call(failure, criterion):
        assert said.startswith("RunFailed: rank 1")
        assert "same model" in said


@pytest.mark.slow
def test_another_kind_of_model_on_a_rank_fails_on_every_rank(group: Group) -> None:
    for said in group.call(failure, "snip", "test_resnet"):
        assert said.startswith("RunFailed")
    group.close()  # They may wait for different things now.


def test_ranks_are_told_what_the_first_one_finds_on_its_disk(group: Group, tmp_path: Path) -> None:
    """Of ticket and result: on a file system that lags, or belongs to a node, others find none."""
    disk = tmp_path / "disk0"
    (cell,) = cells(configs(disk)["pruned"])
    (named,) = cells(configs(disk)["tickets"])
    for each in (cell, named):
        write_json(each.folder / RESULT, {"name": each.name})
    first, second = group.call(told, tmp_path)
    assert first == second
    assert first["pruned"] == [str(cell.folder), cell.ticket.content_hash, {"name": cell.name}]
    assert first["tickets"][0] == str(named.folder)
    assert "no ticket matches" in first["error"] and "disk1" in first["error"]
    assert not (tmp_path / "disk1").exists()
