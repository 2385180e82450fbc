"""What sparse training adds to an optimizer, by hand and on compact weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from autosparse.core.errors import UsageError
from autosparse.sparsity.compact import compact_weights, densify, hold_compact
from autosparse.sparsity.ticket import compact
from autosparse.training.config import TrainingConfig
from autosparse.training.masked_stepper import can_train
from autosparse.training.optimizers import optimizer_and_schedule
from autosparse.training.steppers import History, PlainStepper
from autosparse.training.wrappers.sparseopt import factors
from tests.conftest import few, make_model
from tests.training.test_masked_stepper import masked, same, steps, ticket_of
from tests.training.test_topology import images_of, losses

pytestmark = pytest.mark.usefixtures("one_thread")

SGD = TrainingConfig(
    epochs=1, batch_size=8, optimizer="sgd", learning_rate=0.1, weight_decay=0.0, schedule="none",
    optimizer_options={"momentum": 0.0, "nesterov": False}, sparse_products=False,
)  # fmt: skip


def stepped(wrapper: str, weight: list[float], gradient: list[float], **options) -> list[float]:
    """Return a weight of one row after one step of SGD; the bias has a gradient of one."""
    model = nn.Linear(len(weight), 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([weight]))
        model.bias.fill_(2.0)
    config = replace(SGD, optimizer_wrapper=wrapper, optimizer_wrapper_options=options)
    optimizer, _ = optimizer_and_schedule(model, config, 10)
    model.weight.grad, model.bias.grad = torch.tensor([gradient]), torch.ones(1)
    optimizer.step()
    assert model.bias.item() == pytest.approx(1.9), "biases are stepped as ever"
    return model.weight[0].tolist()


def test_ham_by_hand() -> None:
    """theta' = theta - 0.1 g, then times exp(-0.1 (3 sign(theta') g + 0.5)); -5 is the bound."""
    found = stepped("ham", [1.0, -1.0, 0.0, 1.0], [2.0, 2.0, 0.0, -90.0], alpha=3.0, beta=0.5)
    assert found == pytest.approx(
        [0.8 * math.exp(-0.65), -1.2 * math.exp(0.55), 0.0, 10.0 * math.exp(5.0)]
    )


def test_sign_in_by_hand() -> None:
    """The gradient times sqrt(4 theta^2 + c^2)."""
    found = stepped("sign_in", [1.5, 0.0, -2.0], [1.0, 1.0, 3.0], scale=4.0)
    assert found == pytest.approx([1.5 - 0.1 * 5, -0.4, -2.0 - 0.3 * math.sqrt(32)])


def test_sparseopt_by_hand() -> None:
    """Neurons with 1, 4 and 1 of four weights: densities over their mean are 1/2, 2, 1/2."""
    model = nn.Sequential(nn.Linear(4, 3))
    mask = torch.tensor([[0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
    hold_compact(model, {"0.weight": mask})
    ((_, weight),) = compact_weights(model)
    few, many = math.sqrt(0.5), math.sqrt(2)
    expected = torch.tensor([few, many, many, many, many, few], dtype=torch.float64)
    torch.testing.assert_close(factors(weight), expected)
    plain = torch.ones(1, 4)
    model(plain).sum().backward()
    values = next(p for n, p in model.named_parameters() if n.endswith("original"))
    assert torch.equal(values.grad, torch.ones(6))
    values.grad = None
    optimizer_and_schedule(model, replace(SGD, optimizer_wrapper="sparseopt"), 10)
    model(plain).sum().backward()
    torch.testing.assert_close(values.grad.double(), expected)
    weight.exchange(torch.tensor([0, 1, 4, 5, 8, 9]))  # Two of every neuron.
    values.grad = None
    model(plain).sum().backward()
    assert torch.equal(values.grad, torch.ones(6)), "it follows topologies that move"


@pytest.mark.parametrize(("wrapper", "options"), [("ham", {}), ("sign_in", {"scale": 4.0})])
@pytest.mark.parametrize("name", ["test_byobnet", "test_vit"])
def test_compact_weights_are_trained_as_masked_ones(name: str, wrapper: str, options: dict) -> None:
    config = replace(SGD, optimizer="momentum", optimizer_options={}, weight_decay=0.01,
                     learning_rate=0.02, optimizer_wrapper=wrapper,
                     optimizer_wrapper_options=options)  # fmt: skip
    model = make_model(name).double()
    ticket = ticket_of(model)
    without = replace(config, optimizer_wrapper="none", optimizer_wrapper_options={})
    plain = PlainStepper(compact(make_model(name).double(), ticket), without, 10)
    ours = masked(name, config, ticket, torch.float64)
    theirs = PlainStepper(compact(model, ticket), config, 10)
    found = steps(ours)
    assert found == pytest.approx(steps(theirs), rel=1e-6)  # A loss is a float32.
    assert found != pytest.approx(steps(plain), rel=1e-4), "it does something"
    expected = densify(model).state_dict()
    for key, tensor in ours.model.state_dict().items():
        same(tensor, expected[key], key)


@pytest.mark.parametrize("wrapper", few(["ham", "sign_in", "sparseopt"], ["ham"]))
def test_a_resume_is_equal_in_every_bit(tmp_path, wrapper: str) -> None:
    config = replace(SGD, optimizer_wrapper=wrapper, topology="rigl", topology_every=2, ema=0.9)
    data = images_of(6)

    def make() -> PlainStepper:
        model = make_model()
        stepper = PlainStepper(compact(model, ticket_of(model)), config, 6)
        stepper.model.train()
        return stepper

    whole, cut, again = make(), make(), make()
    expected = losses(whole, data)
    losses(cut, data[:3])
    cut.save(tmp_path, History())
    again.load(tmp_path)
    assert losses(again, data[3:]) == expected[3:]


def test_masked_weights_know_no_fan_in() -> None:
    assert can_train(replace(SGD, optimizer_wrapper="ham"))
    assert not can_train(replace(SGD, optimizer_wrapper="sparseopt"))


@pytest.mark.parametrize(
    ("wrapper", "options", "told"),
    [
        ("hma", {}, "unknown optimizer_wrapper 'hma'. Did you mean 'ham'"),
        ("ham", {"alfa": 1.0}, "unknown option of optimizer_wrapper ham 'alfa'"),
        ("ham", {"alpha": -1.0}, "optimizer_wrapper ham: alpha must be at least 0"),
        ("ham", {"alpha": "much"}, "optimizer_wrapper ham: alpha must be at least 0"),
        ("none", {"alpha": 1.0}, "optimizer_wrapper_options need an optimizer_wrapper"),
    ],
)
def test_mistakes_are_one_line(wrapper: str, options: dict, told: str) -> None:
    config = replace(SGD, optimizer_wrapper=wrapper, optimizer_wrapper_options=options)
    with pytest.raises(UsageError) as caught:
        optimizer_and_schedule(nn.Linear(2, 2), config, 10)
    assert told in str(caught.value) and "\n" not in str(caught.value)
