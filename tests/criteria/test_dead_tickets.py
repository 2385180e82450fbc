"""A ticket whose output does not depend on the image is told, refused if asked, and marked."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from autosparse import prune
from autosparse.core.config import run_id
from autosparse.core.errors import RunFailed, UsageError
from autosparse.criteria.config import PruneConfig
from autosparse.study import table
from autosparse.study.config import SparseTrainConfig
from autosparse.study.trainings import Cell, train_cell
from autosparse.training.steppers import PlainStepper
from tests.conftest import QUICK, make_model

pytestmark = pytest.mark.usefixtures("one_thread")

DEAD = r"this ticket is dead: .*, from 2.weight on; prune at a lower .* guard live"


def cut() -> nn.Module:
    """Magnitude keeps unit 0 of the first layer and what reads unit 1: no path is left."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[9.0, 8], [0.2, 0.1]]))
        model[2].weight.copy_(torch.tensor([[0.3, 7.0], [0.4, 6.0]]))
        model[3].weight.copy_(torch.tensor([[5.0, 0.5]]))
    return model


BATCH = [(torch.randn(4, 2, 1, 1), torch.zeros(4).long())]


def test_a_dead_ticket_is_told_once_and_on_the_card() -> None:
    with pytest.warns(UserWarning, match=DEAD) as told:
        ticket = prune(cut(), BATCH, "magnitude", 0.5)
    assert len(told) == 1
    assert ticket.card["dead"] == "2.weight"
    assert ticket.card["effective_density"] == 0.0


def test_it_is_an_error_where_that_is_asked_for() -> None:
    with pytest.warns(UserWarning), pytest.raises(RunFailed, match=DEAD):
        prune(cut(), BATCH, "magnitude", 0.5, dead="error")
    with pytest.raises(UsageError, match=r"unknown value of dead 'eror'.*error"):
        prune(cut(), BATCH, "magnitude", 0.5, dead="eror")
    assert run_id(PruneConfig(dead="error")) == run_id(PruneConfig())


def test_the_remedy_helps() -> None:
    from autosparse.criteria.scoring import Selection

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ticket = prune(cut(), BATCH, "magnitude", 0.5, selection=Selection(guard="live"))
    assert "dead" not in ticket.card and ticket.card["effective_density"] > 0


def test_training_says_it_again_or_refuses(digits, tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ticket = prune(make_model(), digits, "erk", 0.9)
    ticket = ticket.with_card(dead="stages.0.weight", effective_density=0.0)
    config = SparseTrainConfig(training=QUICK)

    def train(config: SparseTrainConfig) -> dict:
        cell = Cell("mine", ticket, config.data or digits.config, 0, tmp_path / config.dead)
        return train_cell(
            cell, config, digits, lambda model, steps: PlainStepper(model, QUICK, steps),
            device="cpu",
        )  # fmt: skip

    with pytest.raises(RunFailed, match=r"from stages.0.weight on"):
        train(replace(config, dead="error"))
    with pytest.warns(UserWarning, match=r"^mine: this ticket is dead"):
        result = train(config)
    (row,) = table.rows([table.placed(result)])
    assert row["dead"] == 1


def test_tables_mark_the_rows(capsys) -> None:
    usual = {
        "model": "m", "criterion": "snip", "sparsity": 0.9, "seed": 0,
        "test_accuracy": 0.5, "parameters": 1, "checkpoint_bytes": 1, "seconds": 1.0,
        "prune_seconds": 1.0, "effective_density": 0.05,
    }  # fmt: skip
    dead = {**usual, "effective_density": 0.0}

    def mark(*results: dict) -> str:
        return table.mark(table.rows([table.placed(each) for each in results])[0])

    assert mark(usual) == ""
    assert mark(dead, dead) == " (dead)"
    assert mark(usual, dead) == " (1 of 2 dead)"
    assert table.dead([{**usual, "effective_density": None}]) == 0
    table.show_trainings([dead])
    assert "snip (dead)" in capsys.readouterr().out
