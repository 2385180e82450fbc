"""Optimizers by name: groups that decay or not, warm-up and schedules."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

import autosparse
from autosparse import compact, prune
from autosparse.core.errors import UsageError
from autosparse.data.sets import DataSource
from autosparse.training.checks import check
from autosparse.training.config import TrainingConfig
from autosparse.training.optimizers import advance, optimizer_and_schedule, parameter_groups
from tests.conftest import QUICK, make_model


def test_compact_weights_decay_and_norms_do_not() -> None:
    model = make_model()
    ticket = prune(model, "digits", "random", 0.9)
    compact(model, ticket)
    decay, none = parameter_groups(model, 0.05)
    assert decay["weight_decay"] == 0.05
    assert none["weight_decay"] == 0.0
    assert sum(p.numel() for p in decay["params"]) == ticket.kept
    everything = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in none["params"]) == everything - ticket.kept


def test_what_timm_exempts_and_what_is_frozen() -> None:
    model = make_model("test_vit", class_token=True, global_pool="token")
    assert model.no_weight_decay() >= {"pos_embed", "cls_token"}  # type: ignore[operator]
    model.get_parameter("head.weight").requires_grad_(False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay, none = ({names[id(p)] for p in group["params"]} for group in parameter_groups(model, 1))
    assert {"pos_embed", "cls_token", "norm.weight", "head.bias"} <= none
    assert "blocks.0.attn.qkv.weight" in decay
    assert "head.weight" not in decay | none


def test_what_a_model_exempts_is_exempt_when_it_is_compact_too() -> None:
    """By its dense name, its compact one, or a pattern, as timm reads them."""
    plain = make_model()
    ticket = prune(plain, "digits", "random", 0.9)
    first = next(iter(ticket.masks))
    compact_name = f"{first.removesuffix('weight')}parametrizations.weight.original"
    for exempt in ({first}, {compact_name}, {first.replace("weight", "w*t")}):
        model = compact(make_model(), ticket)
        model.no_weight_decay = lambda names=exempt: names  # type: ignore[assignment]
        decay, none = ({id(p) for p in each["params"]} for each in parameter_groups(model, 0.1))
        mine = id(model.get_parameter(compact_name))
        assert mine in none and mine not in decay
        assert sum(p.numel() for p in model.parameters() if id(p) in decay) == ticket.kept - len(
            ticket.values[first]
        )


def test_timms_factory_takes_the_groups() -> None:
    model = make_model()
    ticket = prune(model, "digits", "random", 0.9)
    compact(model, ticket)
    optimizer = create_optimizer_v2(
        autosparse.parameter_groups(model, 0.05), opt="adamw", lr=0.1, weight_decay=0.0
    )
    decays = [(g["weight_decay"], p.numel()) for g in optimizer.param_groups for p in g["params"]]
    assert sum(count for decay, count in decays if decay == 0.05) == ticket.kept


def test_a_parametrization_of_the_users_own_is_no_compact_weight() -> None:
    """A bias stays a bias, whatever computes it."""
    model = nn.Linear(3, 3)
    register_parametrization(model, "bias", nn.Identity())
    decay, none = parameter_groups(model, 0.1)
    assert [p.ndim for p in decay["params"]] == [2]
    assert [p.ndim for p in none["params"]] == [1]


def test_a_group_without_parameters_is_left_out() -> None:
    (group,) = parameter_groups(nn.Linear(2, 2, bias=False), 0.1)
    assert group["weight_decay"] == 0.1


def test_warm_up_rises_linearly_and_the_cosine_ends_near_zero() -> None:
    config = TrainingConfig(epochs=10, warmup_epochs=2, learning_rate=1.0, weight_decay=0.0)
    optimizer, scheduler = optimizer_and_schedule(make_model(), config, 5)
    rates = []
    for update in range(50):
        advance(scheduler, update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:10] == pytest.approx([update / 10 for update in range(10)])
    expected = [0.5 * (1 + math.cos(math.pi * update / 50)) for update in range(10, 50)]
    assert rates[10:] == pytest.approx(expected)


def test_a_constant_rate_stays() -> None:
    optimizer, scheduler = optimizer_and_schedule(make_model(), replace(QUICK, schedule="none"), 5)
    advance(scheduler, 7)
    assert scheduler is None
    assert [group["lr"] for group in optimizer.param_groups] == [QUICK.learning_rate] * 2


@pytest.mark.parametrize(
    ("options", "said"),
    [({"momentum": 0.0}, "optimizer sgd: Nesterov"), ({"bets": 1}, "optimizer sgd: .*bets")],
)
def test_options_that_an_optimizer_refuses(digits: DataSource, options: dict, said: str) -> None:
    config = replace(QUICK, optimizer="sgd", optimizer_options=options)
    with pytest.raises(UsageError, match=said):
        optimizer_and_schedule(make_model(), config, 3)


def test_biases_of_norms_have_a_rate_of_their_own() -> None:
    """Through warm-up and cosine alike; by default there are two groups, as before."""
    config = TrainingConfig(epochs=4, warmup_epochs=1, learning_rate=0.1, bias_rate=64.0)
    model = make_model()
    optimizer, scheduler = optimizer_and_schedule(model, config, 2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    *others, fast = optimizer.param_groups
    found = {names[id(p)] for p in fast["params"]}
    expected = {
        f"{path}.bias"
        for path, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    assert found == expected and fast["weight_decay"] == 0.0
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    for step in (1, 3, 6):
        advance(scheduler, step)
        assert fast["lr"] == pytest.approx(64 * others[0]["lr"]) and others[0]["lr"] > 0
    usual, _ = optimizer_and_schedule(make_model(), replace(config, bias_rate=1.0), 2)
    assert len(usual.param_groups) == 2
    constant, _ = optimizer_and_schedule(make_model(), replace(config, schedule="none"), 2)
    assert [group["lr"] for group in constant.param_groups] == pytest.approx([0.1, 0.1, 6.4])
    with pytest.raises(UsageError, match="bias_rate"):
        check(replace(config, bias_rate=0.0))
