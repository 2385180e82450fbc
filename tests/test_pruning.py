"""`prune`: budgets, cards, what data it takes, errors."""

from __future__ import annotations

import pytest
import torch

from autosparse import prune
from autosparse.config import DataConfig, keep_count
from autosparse.data import DataSource
from autosparse.errors import UsageError
from autosparse.models import prunable
from tests.conftest import SMALL_DIGITS, make_model


@pytest.mark.parametrize("criterion", ["random", "erk", "magnitude", "snip", "synflow"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.987])
def test_the_budget_is_exact(digits: DataSource, criterion: str, sparsity: float) -> None:
    model = make_model()
    options = {"rounds": 3} if criterion == "synflow" else None
    ticket = prune(model, digits, criterion, sparsity, options=options)
    total = sum(weight.numel() for weight in prunable(model).values())
    assert ticket.kept == keep_count(total, sparsity)


def test_the_model_is_not_changed(digits: DataSource) -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prune(model, digits, "snip", 0.9)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_batches_a_name_and_a_source_give_the_same_ticket(digits: DataSource) -> None:
    model = make_model()
    from_source = prune(model, digits, "snip", 0.9)
    from_config = prune(model, SMALL_DIGITS, "snip", 0.9)
    from_batches = prune(model, digits.score_batches(10), "snip", 0.9)
    assert from_source.fingerprint == from_config.fingerprint == from_batches.fingerprint


def test_the_card_says_how_it_came_about(digits: DataSource) -> None:
    card = prune(make_model(seed=4), digits, "snip", 0.9, seed=4, scope="layer").card
    assert card["model"]["name"] == "test_byobnet"
    assert card["model"]["seed"] == 4
    assert card["data"]["train_limit"] == 300
    assert card["data_fingerprint"] == digits.fingerprint
    assert (card["criterion"], card["sparsity"]) == ("snip", 0.9)
    assert card["selection"]["scope"] == "layer"
    assert "torch" in card["versions"]


def test_excluded_layers_are_left_out(digits: DataSource) -> None:
    ticket = prune(make_model(), digits, "magnitude", 0.9, exclude=["head"])
    assert not any(name.startswith("head") for name in ticket.masks)
    assert any(name.startswith("head") for name in ticket.rest)


def test_layer_scope_prunes_every_layer_alike(digits: DataSource) -> None:
    ticket = prune(make_model(), digits, "magnitude", 0.75, scope="layer")
    for row in ticket.table():
        assert abs(row["kept"] - 0.25 * row["weights"]) <= 1


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.5])
def test_sparsity_out_of_range(digits: DataSource, sparsity: float) -> None:
    with pytest.raises(UsageError, match="sparsity must be"):
        prune(make_model(), digits, "random", sparsity)


def test_names_that_nobody_knows() -> None:
    with pytest.raises(UsageError, match="'snip'"):
        prune(make_model(), "digits", "snipp", 0.9)
    with pytest.raises(UsageError, match="'digits'"):
        prune(make_model(), DataConfig(name="digit"), "snip", 0.9)
    with pytest.raises(UsageError, match="'global'"):
        prune(make_model(), "digits", "random", 0.9, scope="globl")


def test_autos_without_a_file_says_how_to_get_one(tmp_path) -> None:
    with pytest.raises(UsageError, match="autosparse fit"):
        prune(make_model(), "digits", "autos", options={"scorer": str(tmp_path / "none")})
