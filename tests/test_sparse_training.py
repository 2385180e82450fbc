"""Cells: found when finished, keyed by all that made them, results and trained tickets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autosparse import prune
from autosparse.compaction import load_state
from autosparse.config import ModelConfig, SparseTrainConfig
from autosparse.data import DataSource
from autosparse.errors import UsageError
from autosparse.sparse_training import TRAINED, Cell, cells, train_cell
from autosparse.ticket import Ticket
from autosparse.training import PlainStepper, evaluate
from tests.conftest import QUICK, SMALL_DIGITS, make_model


@pytest.fixture()
def config(tmp_path: Path, digits: DataSource) -> SparseTrainConfig:
    ticket = prune(make_model(), digits, "erk", 0.9)
    ticket.save(tmp_path / "tickets" / "erk.safetensors")
    return SparseTrainConfig(
        tickets=[str(tmp_path / "tickets" / "*.safetensors")],
        training=QUICK,
        out=str(tmp_path / "trained"),
    )


def _train(cell: Cell, config: SparseTrainConfig, digits: DataSource, **options) -> dict:
    return train_cell(
        cell,
        config,
        digits,
        lambda model, steps: PlainStepper(model, config.training, steps),
        device="cpu",
        **options,
    )


def test_a_trained_ticket_has_the_accuracy_it_records(config, digits: DataSource) -> None:
    (cell,) = cells(config)
    result = _train(cell, config, digits)
    ticket = Ticket.load(cell.folder / TRAINED)
    model = make_model(seed=7)
    load_state(model, ticket)
    assert evaluate(model, digits, digits.test).accuracy == result["test_accuracy"]
    assert ticket.fingerprint == cell.ticket.fingerprint
    assert ticket.content_hash != cell.ticket.content_hash
    assert result["checkpoint_bytes"] == (cell.folder / TRAINED).stat().st_size


def test_parameters_are_survivors_and_the_rest(config, digits: DataSource) -> None:
    (cell,) = cells(config)
    dense = make_model()
    others = sum(p.numel() for p in dense.parameters()) - sum(
        mask.numel() for mask in cell.ticket.masks.values()
    )
    assert _train(cell, config, digits)["parameters"] == cell.ticket.kept + others


def test_a_finished_cell_is_not_trained_again(config, digits: DataSource) -> None:
    (cell,) = cells(config)
    result = _train(cell, config, digits)
    (again,) = cells(config)
    assert again.done
    assert _train(again, config, digits, on_epoch=lambda _: pytest.fail("trained again")) == result


def test_other_settings_make_another_cell(config) -> None:
    (cell,) = cells(config)
    (other,) = cells(replace(config, training=replace(QUICK, epochs=2)))
    (seeded,) = cells(replace(config, seed=3))
    (elsewhere,) = cells(replace(config, device="cpu", tracking=False))
    assert len({cell.folder, other.folder, seeded.folder}) == 3
    assert elsewhere.folder == cell.folder


def test_without_a_ticket_the_model_is_trained_dense(config, digits: DataSource) -> None:
    dense = replace(config, tickets=[], model=ModelConfig("test_byobnet"), data=SMALL_DIGITS)
    (cell,) = cells(dense)
    result = _train(cell, dense, digits)
    assert result["sparsity"] == 0.0
    assert result["parameters"] == sum(p.numel() for p in make_model().parameters())


def test_nothing_to_train_is_an_error(config) -> None:
    with pytest.raises(UsageError, match="give tickets, or a model"):
        list(cells(replace(config, tickets=[])))
    with pytest.raises(UsageError, match=r"no ticket matches .*nothing"):
        list(cells(replace(config, tickets=["nothing*.safetensors"])))


def test_a_ticket_that_empties_a_layer_is_named(config, tmp_path: Path) -> None:
    (cell,) = cells(config)
    name = next(iter(cell.ticket.masks))
    masks = {**cell.ticket.masks, name: torch.zeros_like(cell.ticket.masks[name])}
    values = {**cell.ticket.values, name: torch.empty(0)}
    Ticket(masks, values, cell.ticket.rest, cell.ticket.card).save(tmp_path / "empty.safetensors")
    with pytest.raises(UsageError, match=f"empties a layer: {name}"):
        list(cells(replace(config, tickets=str(tmp_path / "empty.safetensors"))))


def test_one_pattern_or_a_list_of_them(config) -> None:
    (listed,) = cells(config)
    (single,) = cells(replace(config, tickets=config.tickets[0]))
    assert single.folder == listed.folder


def test_data_that_do_not_fit_the_model_are_named(config, digits: DataSource) -> None:
    (cell,) = cells(config)
    with pytest.raises(UsageError, match="num_classes 10, the data digits 7"):
        _train(cell, config, replace(digits, num_classes=7))


def test_training_changes_survivors_only(config, digits: DataSource) -> None:
    (cell,) = cells(config)
    _train(cell, config, digits)
    state = Ticket.load(cell.folder / TRAINED).dense_state()
    for name, mask in cell.ticket.masks.items():
        assert bool((state[name][~mask] == 0).all())
        assert not torch.equal(state[name][mask], cell.ticket.values[name])
