"""Concrete Ticket Search: gates, balance and a step by hand; small searches against enumeration."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from autosparse import criteria
from autosparse.core.errors import RunFailed, UsageError
from autosparse.criteria.cts import GradBalance, gate, reverse_kl
from autosparse.models.gradients import counting
from autosparse.sparsity import masks
from tests.criteria.plain import chain, convnet, flat, images, samples, squared_error

cts = criteria.get("cts")


# Gates


def test_a_gate_by_hand() -> None:
    # u = 1/2 adds nothing: sigmoid(ln 3 / 0.5) = 9 / 10. u = 3/4 adds ln 3: sigmoid(4 ln 3).
    odds = torch.tensor([3.0, 3.0], dtype=torch.float64).log()
    uniform = torch.tensor([0.5, 0.75], dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand_like", lambda like, **_: uniform.clone())
        found = gate(odds, 0.5)
    torch.testing.assert_close(found, torch.tensor([9 / 10, 81 / 82], dtype=torch.float64))


def test_gates_are_above_one_half_as_often_as_their_odds_say() -> None:
    torch.manual_seed(0)
    draws = gate(torch.full((100_000,), math.log(0.2 / 0.8)), 2 / 3)
    assert draws.min() > 0 and draws.max() < 1
    # Four standard deviations of a share of 0.2 in 100,000 draws.
    assert float((draws > 0.5).double().mean()) == pytest.approx(0.2, abs=4 * 0.4 / 316)


def test_the_cooler_the_nearer_to_zero_and_one() -> None:
    torch.manual_seed(0)
    inside = [
        float((gate(torch.zeros(10_000), warmth) - 0.5).abs().mean()) for warmth in (2, 0.5, 0.01)
    ]
    assert inside == sorted(inside)
    assert inside[-1] > 0.49


# GradBalance


def expected_count(odds: Tensor) -> Tensor:
    return odds.sigmoid().sum()


def test_the_balance_is_held_above_the_limit() -> None:
    torch.manual_seed(0)
    odds, task = torch.randn(50).double().requires_grad_(), torch.randn(50).double()
    (pull,) = torch.autograd.grad(expected_count(odds), odds)
    added = GradBalance(limit=10)(odds.detach(), task) - task
    assert float(added.norm()) == pytest.approx(float(task.norm()))
    assert torch.allclose(added / added.norm(), pull / pull.norm())


def test_up_to_the_limit_weights_cost_nothing() -> None:
    odds, task = torch.zeros(6), torch.arange(6.0)
    assert torch.equal(GradBalance(limit=3)(odds, task), task)
    assert not torch.equal(GradBalance(limit=2.9)(odds, task), task)


def test_the_price_is_a_running_mean() -> None:
    # Four gates at one half: each d(count)/dφ is 1/4, their norm 1/2. Tasks of norm 2, then 5 are
    # prices of 4 and 10; then two weights are expected, which is the limit: a price of 0.
    balance, half = GradBalance(limit=1.9), torch.zeros(4).double()
    task = torch.tensor([1.0, 1, 1, 1]).double()
    assert torch.allclose(balance(half, task), task + 4 / 4)
    second = 0.99 * 4 + 0.01 * 10
    assert torch.allclose(balance(half, 2.5 * task), 2.5 * task + second / 4)
    fewer = torch.full((4,), math.log(0.25 / 0.75)).double()
    third = 0.99 * second
    assert torch.allclose(balance(fewer, task), task + third * 0.25 * 0.75)


def test_gradients_as_small_as_floats_can_be_are_balanced_too() -> None:
    task = torch.full((4,), 1e-30)
    added = GradBalance(limit=1)(torch.zeros(4), task) - task
    assert torch.allclose(added / 1e-30, torch.ones(4))


# The objective


def test_reverse_kl_by_hand() -> None:
    # The sparse network says (3/4, 1/4), the dense one (1/2, 1/2).
    sparse, dense = torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)
    by_hand = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(reverse_kl(sparse, dense)) == pytest.approx(by_hand)
    assert float(reverse_kl(dense, sparse)) != pytest.approx(by_hand, rel=1e-2)


# The search


def test_a_step_by_hand() -> None:
    # Gates lie in (0, 1), so the output is below 1.5 and the target of 5: the loss falls with
    # every positive weight that opens and every negative one that shuts. Adam's first step is the
    # rate in that direction, whatever the gates were; no more weights are expected than two.
    model = chain([[-2.0, 1.0, -0.6, 0.5]])
    batch = samples(([1.0, 1.0, 1.0, 1.0], [5.0]))
    found = cts(model, [batch], squared_error, sparsity=0.5, objective="loss", steps=1)
    assert found["0.weight"].tolist() == [[False, True, False, True]]


def one_layer(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer of 8 weights, 32 inputs, and what it says of them with 3 weights drawn by chance."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, 4, generator=generator).double()
    inputs = torch.randn(32, 4, generator=generator).double()
    planted = torch.zeros(8)
    planted[torch.randperm(8, generator=generator)[:3]] = 1
    return chain(weight.tolist()), inputs, inputs @ (weight * planted.view(2, 4)).T


def best_of_all(weight: Tensor, value: Callable[[Tensor], Tensor]) -> list[bool]:
    """Of all masks with three weights, the one whose network has the lowest value."""
    every = []
    for kept in combinations(range(8), 3):
        mask = torch.zeros(8, dtype=torch.bool)
        mask[list(kept)] = True
        every.append((float(value(weight * mask.view(2, 4))), mask.tolist()))
    return min(every)[1]


@pytest.mark.parametrize(("objective", "seed"), [("loss", 3), ("kl", 1), ("kl", 7)])
def test_the_best_mask_of_all_is_found(objective: str, seed: int) -> None:
    model, inputs, targets = one_layer(seed)
    weight = model[0].weight.data

    def value(sparse: Tensor) -> Tensor:
        outputs = inputs @ sparse.T
        if objective == "loss":
            return squared_error(outputs, targets)
        p, q = outputs.softmax(1), (inputs @ weight.T).softmax(1)
        return (p * (p / q).log()).sum(1).mean()

    found = cts(
        model, [(inputs, targets)], squared_error,
        sparsity=5 / 8, objective=objective, steps=100,
    )  # fmt: skip
    best = best_of_all(weight, value)
    assert flat(found).tolist() == best
    assert flat(masks.keep({"": weight.abs()}, 3)).tolist() != best


OPTIONS = {"sparsity": 0.9, "steps": 3}


def test_exactly_as_many_as_asked_for_and_one_in_every_layer() -> None:
    for sparsity in (0.0, 0.5, 0.937, 0.99):
        found = cts(convnet(), images(8, 8), cross_entropy, sparsity=sparsity, steps=3)
        assert masks.kept(found) == 264 - round(264 * sparsity)
        assert masks.first_empty(found) is None


def test_what_no_gradient_tells_apart_is_kept_by_position() -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    batch = (torch.zeros(3, 4), torch.zeros(3).long())
    found = cts(model, [batch], cross_entropy, sparsity=0.5, steps=2)
    assert flat(found).tolist() == [True] * 4 + [False] * 4


def test_the_seed_fixes_the_search() -> None:
    first, again, other = (
        flat(cts(convnet(), images(8, 8), cross_entropy, **OPTIONS, seed=seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_batches_that_can_be_read_once_do_as_well() -> None:
    batches = images(8, 5, 7)
    first = cts(convnet(), batches, cross_entropy, **OPTIONS)
    again = cts(convnet(), iter(batches), cross_entropy, **OPTIONS)
    assert torch.equal(flat(first), flat(again))


def test_the_last_steps_are_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.Adam.step

    def watched(self: Any, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    cts(convnet(), images(8), cross_entropy, sparsity=0.9, steps=25, learning_rate=0.5)
    assert rates == [0.5] * 22 + [0.05] * 3


def test_weights_stay_and_batch_norm_is_put_back() -> None:
    model = convnet()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    cts(model, images(8, 8), cross_entropy, **OPTIONS, beginning="fisher")
    assert all(torch.equal(model.state_dict()[name], each) for name, each in before.items())
    assert model.training


def test_the_mode_is_that_of_scoring() -> None:
    train, evaluate = (
        cts(convnet(), images(8), cross_entropy, sparsity=0.9, steps=20, training_mode=mode)
        for mode in (True, False)
    )
    assert not torch.equal(flat(train), flat(evaluate))


@pytest.mark.parametrize(("objective", "passes"), [("kl", 4 / 3), ("loss", 1)])
def test_cost(objective: str, passes: float) -> None:
    # Four steps take 8 + 5 + 7 + 8 images.
    with counting() as cost:
        cts(
            convnet(), images(8, 5, 7), cross_entropy,
            sparsity=0.9, steps=4, objective=objective,
        )  # fmt: skip
    assert cost.image_passes == pytest.approx(28 * passes)


def test_the_card_says_what_density_the_gates_expect() -> None:
    with counting() as cost:
        cts(convnet(), images(8), cross_entropy, sparsity=0.9, steps=1, learning_rate=1e-9)
    assert cost.notes["expected_density"] == pytest.approx(26 / 264)


# Where it begins


@pytest.mark.parametrize("beginning", ["magnitude", "erk", "snip"])
def test_with_trust_and_no_rate_it_is_the_beginning(beginning: str) -> None:
    options = {"sparsity": 0.9} if beginning == "erk" else {}
    scores = criteria.get(beginning)(convnet(), images(8, 8), cross_entropy, **options)
    found = cts(
        convnet(), images(8, 8), cross_entropy,
        sparsity=0.9, steps=1, learning_rate=1e-9, beginning=beginning, trust=0.5,
    )  # fmt: skip
    assert torch.equal(flat(found), flat(masks.from_scores(scores, 0.9)))


def test_chances_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # Magnitude keeps -2 and 3: one of two weights in the first layer, one of four in the second.
    # With a trust of 0.2 those two begin at 0.2 + 0.8 d, the others at 0.8 d.
    model = chain([[-2.0], [1.0]], [[0.1, 3.0], [0.2, 0.3]])
    seen: list[Tensor] = []

    def watched(odds: Tensor, temperature: float) -> Tensor:
        seen.append(odds.detach().clone())
        return gate(odds, temperature)

    monkeypatch.setattr("autosparse.criteria.cts.gate", watched)
    options = {"sparsity": 4 / 6, "steps": 1, "objective": "loss", "beginning": "magnitude"}
    batch = samples(([1.0], [0.0, 1.0]))
    for trust in (0.0, 0.2):
        cts(model, [batch], squared_error, trust=trust, **options)
    expected = [[0.5, 0.5, 0.25, 0.25, 0.25, 0.25], [0.6, 0.4, 0.2, 0.4, 0.2, 0.2]]
    torch.testing.assert_close([each.sigmoid().tolist() for each in seen], expected)


def test_the_beginning_costs_too() -> None:
    with counting() as cost:
        cts(
            convnet(), images(8, 5, 7), cross_entropy,
            sparsity=0.9, steps=3, objective="loss", beginning="snip",
        )  # fmt: skip
    assert cost.image_passes == 20 + 13  # SNIP looks at two batches.


def test_files_of_the_beginning_are_on_the_card_and_in_ids() -> None:
    assert cts.beyond({}) == {}
    autos = criteria.get("autos")
    own = {f"autos.{key}": each for key, each in autos.changed_defaults(()).items()}
    assert cts.beyond({"beginning": "autos"}) == own | autos.provenance()
    assert cts.provenance(beginning="erk") == {}


# What cannot be

WRONG = {
    "objective": ({"objective": "mse"}, "unknown objective 'mse'"),
    "steps": ({"steps": 0}, "cts: steps must be whole and at least 1, got 0"),
    "half a step": ({"steps": 2.5}, "cts: steps must be whole and at least 1, got 2.5"),
    "a word": ({"steps": "many"}, "cts: steps must be whole and at least 1, got many"),
    "trust in words": ({"trust": "a"}, "cts: trust must be at least 0 and below 1, got a"),
    "no beginning": ({"beginning": None}, "unknown criterion None"),
    "rate": ({"learning_rate": 0.0}, "cts: learning_rate must be above 0, got 0.0"),
    "temperature": ({"temperature": -1}, "cts: temperature must be above 0, got -1"),
    "trust": ({"trust": 1.0}, "cts: trust must be at least 0 and below 1, got 1.0"),
    "batch_size": ({"batch_size": 0}, "cts: batch_size must be whole and at least 1, got 0"),
    "beginning": ({"beginning": "ekr"}, "unknown criterion 'ekr'"),
    "trains": ({"beginning": "short_irp"}, "a criterion that does not train, and short_irp does"),
    "itself": ({"beginning": "cts"}, "a criterion that does not train, and cts does"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str) -> None:
    options, said = WRONG[name]
    with pytest.raises(UsageError, match=said):
        cts(convnet(), images(8), cross_entropy, **{"sparsity": 0.9, **options})


@pytest.mark.parametrize(
    "options", [{"beginning": "ekr"}, {"beginning": "short_irp"}, {"objective": "kll"}]
)
def test_what_is_wrong_is_refused_before_work_begins(options: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"ekr|does not train|kll"):
        cts.check_whole(options, filled=("sparsity", "seed"))


class Several(nn.Module):
    """Two heads in a dict, and one number per image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, pixels: Tensor) -> Any:
        return {"a": self.first(pixels), "b": [self.second(pixels)], "mean": pixels.mean(1)}


def test_all_class_scores_are_compared() -> None:
    # Without a head's divergence its log-odds would all be as they began, kept by position.
    torch.manual_seed(1)
    batch = (torch.randn(16, 4), torch.zeros(16).long())
    found = cts(Several(), [batch], cross_entropy, sparsity=0.5, steps=1)
    for name in ("first", "second"):
        assert 0 < found[f"{name}.weight"].sum() < found[f"{name}.weight"].numel()


def test_kl_needs_class_scores() -> None:
    batch = (torch.randn(4, 4), torch.zeros(4, 1))
    said = r"class scores \[B, classes\], .* none among .*; set options.objective to loss"
    options = {"sparsity": 0.5, "steps": 1}
    with pytest.raises(UsageError, match=said):
        cts(nn.Linear(4, 1), [batch], squared_error, **options)
    assert cts(nn.Linear(4, 1), [batch], squared_error, **options, objective="loss")


def test_no_batch() -> None:
    with pytest.raises(UsageError, match="criterion cts needs data, and there is no batch"):
        cts(convnet(), [], cross_entropy, **OPTIONS)


def test_a_search_that_is_not_finite() -> None:
    with pytest.raises(RunFailed, match=r"not finite; lower options\.learning_rate"):
        cts(
            convnet(), images(8), lambda outputs, labels: outputs.sum() * math.nan,
            **OPTIONS, objective="loss",
        )  # fmt: skip
