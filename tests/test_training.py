"""The training loop: order, groups, schedule, resume, NaN, evaluation."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from autosparse import compact, prune
from autosparse.config import TrainingConfig
from autosparse.data import DataSource
from autosparse.errors import RunFailed, UsageError
from autosparse.optimizers import optimizer_and_schedule, parameter_groups
from autosparse.training import (
    PlainStepper,
    Span,
    evaluate,
    fit,
    seeded,
    steps_per_epoch,
)
from tests.conftest import QUICK, make_model


def _trained(model: nn.Module, source: DataSource, config: TrainingConfig, **options) -> list[dict]:
    stepper = PlainStepper(model, config, steps_per_epoch(source.train, config))
    with seeded(5):
        return fit(stepper, source, config, seed=5, **options).plain()


def test_a_seed_fixes_everything(digits: DataSource) -> None:
    states = []
    for _ in range(2):
        model = make_model(drop_path_rate=0.2)
        _trained(model, digits, QUICK)
        states.append(model.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


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


def test_warm_up_rises_linearly_and_the_cosine_ends_near_zero(digits: DataSource) -> None:
    config = TrainingConfig(epochs=10, warmup_epochs=2, learning_rate=1.0, weight_decay=0.0)
    optimizer, scheduler = optimizer_and_schedule(make_model(), config, 5)
    rates = []
    for update in range(50):
        scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:10] == pytest.approx([update / 10 for update in range(10)])
    assert max(rates) > 0.85
    assert 0 <= rates[-1] < 0.01


def test_a_resumed_training_ends_as_the_unbroken_one(digits: DataSource, tmp_path: Path) -> None:
    config = replace(QUICK, epochs=4, checkpoint_epochs=2)
    whole, broken, resumed = (make_model(drop_path_rate=0.2) for _ in range(3))
    expected = _trained(whole, digits, config)
    with pytest.raises(KeyboardInterrupt):
        _trained(broken, digits, config, folder=tmp_path, on_epoch=_interrupt_after(3))
    seen: list[int] = []
    history = _trained(
        resumed, digits, config, folder=tmp_path, on_epoch=lambda epoch: seen.append(epoch.epoch)
    )
    assert seen == [3, 4]
    assert [e["train_loss"] for e in history] == [e["train_loss"] for e in expected]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def _interrupt_after(last: int):
    def watch(epoch) -> None:
        if epoch.epoch == last:
            raise KeyboardInterrupt

    return watch


def test_a_nan_loss_stops_and_names_the_step(digits: DataSource) -> None:
    model = make_model()
    first = next(model.parameters())
    with torch.no_grad():
        first.fill_(float("nan"))
    with pytest.raises(RunFailed, match=r"loss is nan at step 1 \(epoch 1\)"):
        _trained(model, digits, QUICK)


def test_clipping_bounds_the_step(digits: DataSource) -> None:
    config = replace(
        QUICK, optimizer="sgd", learning_rate=1.0, schedule="none", weight_decay=0.0,
        clip_grad=0.01, optimizer_options={"momentum": 0.0, "nesterov": False},
    )  # fmt: skip
    model = make_model()
    before = copy.deepcopy(list(model.parameters()))
    stepper = PlainStepper(model, config, 1)
    images, labels = digits.score_batches(2)[0]
    stepper.step(images, labels)
    moved = sum((a - b).square().sum() for a, b in zip(before, model.parameters(), strict=True))
    assert float(moved.detach().sqrt()) == pytest.approx(0.01, rel=1e-3)


def test_evaluation_counts_every_image_once(digits: DataSource) -> None:
    model = make_model()
    found = evaluate(model, digits, digits.test)
    images, labels = digits.test.images, digits.test.labels
    with torch.no_grad():
        outputs = model.eval()(digits.prepare(images))
    assert found.images == len(labels)
    assert found.accuracy == pytest.approx(float((outputs.argmax(1) == labels).float().mean()))
    assert found.loss == pytest.approx(
        float(nn.functional.cross_entropy(outputs, labels)), rel=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optimizer": "adamww"}, "adamw"),
        ({"schedule": "cosin"}, "cosine"),
        ({"optimizer_options": {"bets": 1}}, "bets"),
        ({"batch_size": 10_000}, "batch_size"),
        ({"precision": "fp8"}, "precision"),
    ],
)
def test_bad_settings_are_named(digits: DataSource, changes: dict, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        _trained(make_model(), digits, replace(QUICK, **changes))


@pytest.mark.parametrize("cut", [1, 3, 4, 5])
def test_two_spans_are_one_training(digits: DataSource, cut: int) -> None:
    """Plain SGD has no state of its own, so a span from the state after `cut` is the rest."""
    config = replace(
        QUICK,
        epochs=2,
        optimizer="momentum",
        optimizer_options={"momentum": 0.0},
        learning_rate=0.05,
    )
    steps = steps_per_epoch(digits.train, config)
    assert steps == 3
    whole, parts = make_model(), make_model()
    fit(PlainStepper(whole, config, steps), digits, config, seed=3)
    made: list[int] = []
    for span in (Span(last=cut), Span(first=cut)):
        stepper = PlainStepper(parts, config, steps)
        fit(stepper, digits, config, seed=3, span=span, on_step=made.append)
    assert made == [1, 2, 3, 4, 5, 6]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name


def test_a_span_that_is_over_before_it_begins(digits: DataSource) -> None:
    stepper = PlainStepper(make_model(), QUICK, steps_per_epoch(digits.train, QUICK))
    with pytest.raises(UsageError, match="starts after step 3 and has 3 steps"):
        fit(stepper, digits, QUICK, seed=0, span=Span(first=3))


def test_options_that_an_optimizer_refuses(digits: DataSource) -> None:
    config = replace(QUICK, optimizer="sgd", optimizer_options={"momentum": 0.0})
    with pytest.raises(UsageError, match="optimizer sgd: Nesterov"):
        PlainStepper(make_model(), config, 3)
