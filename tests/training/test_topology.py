"""Topologies that move: the exchange by hand, against masked-dense RigL, and over a resume."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autosparse.core.errors import UsageError
from autosparse.models import zoo
from autosparse.sparsity import masks
from autosparse.sparsity.compact import compact_weights
from autosparse.sparsity.reach import live
from autosparse.sparsity.ticket import Ticket, compact
from autosparse.training import flat_scatter
from autosparse.training.checks import check
from autosparse.training.config import TrainingConfig
from autosparse.training.steppers import History, PlainStepper
from autosparse.training.topology import mest, rigl
from autosparse.training.topology import set as set_
from autosparse.training.topology.growth import (
    Layer,
    fraction_at,
    grow,
    rearranged,
    sources,
)
from tests.conftest import make_model
from tests.training.masked_rigl import masked_rigl

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 10
RIGL = TrainingConfig(
    epochs=1, batch_size=8, learning_rate=3e-3, schedule="none", clip_grad=1.0,
    optimizer_options={"eps": 1e-5}, sparse_products=False,
    topology="rigl", topology_every=3, topology_until=1.0,
)  # fmt: skip
CASES = {"test_byobnet": {}, "test_vit": {"global_pool": "avg"}}


def layer_of(values: list[float], index: list[int], size: int, gradient=None) -> Layer:
    dense = None if gradient is None else torch.tensor(gradient)
    return Layer(torch.tensor(index), torch.tensor(values), size, dense)


def places(marked: Tensor) -> list[int]:
    return marked.nonzero().squeeze(1).tolist()


# By hand


def test_rigl_removes_the_smallest_the_last_of_equals_first() -> None:
    layer = layer_of([0.5, -0.1, 0.1, -2.0], [0, 3, 4, 7], 8)
    assert places(rigl.stays(layer, 1)) == [0, 1, 3]
    assert places(rigl.stays(layer, 2)) == [0, 3]
    assert places(rigl.stays(layer, 0)) == [0, 1, 2, 3]


def test_set_removes_of_both_signs_in_proportion() -> None:
    """Of five negative and three positive weights, of four that go: two and two."""
    layer = layer_of([-1.0, -2.0, -3.0, -4.0, -5.0, 0.1, 0.2, 0.3], list(range(8)), 20)
    assert places(set_.stays(layer, 4)) == [2, 3, 4, 7]
    assert places(rigl.stays(layer, 4)) == [1, 2, 3, 4]


def test_mest_spares_what_has_a_gradient() -> None:
    gradient = [9.0, 0.0, 0.5, 0.0]
    layer = layer_of([0.3, 0.1, 0.2], [1, 2, 3], 4, gradient)
    assert places(mest.stays(layer, 1)) == [0, 1]
    assert places(mest.stays(layer, 1, gradient_weight=0.0)) == [0, 2]


def test_the_highest_scores_come_among_all_that_do_not_stay() -> None:
    """Position 4 went and comes back, as its score is the second among the free ones."""
    layer = layer_of([1.0, 0.1, 0.2], [1, 4, 5], 6)
    stays = torch.tensor([True, False, False])
    scores = torch.tensor([0.0, 9.0, 5.0, 0.0, 4.0, 0.0])
    assert grow(layer, stays, scores).tolist() == [1, 2, 4]
    assert grow(layer, stays, torch.zeros(6)).tolist() == [0, 1, 2], "ties: the first ones"


def test_where_too_few_may_come_the_largest_of_what_went_stay() -> None:
    layer = layer_of([1.0, 0.1, -0.2], [1, 4, 5], 6)
    stays, reach = torch.tensor([True, False, False]), torch.zeros(6, dtype=torch.bool)
    assert grow(layer, stays, torch.rand(6), reach).tolist() == [1, 4, 5]
    reach[[0, 1]] = True
    assert grow(layer, stays, torch.rand(6), reach).tolist() == [0, 1, 5]


def test_old_survivors_keep_what_is_theirs_new_ones_begin_at_zero() -> None:
    source = sources(torch.tensor([1, 4, 5]), torch.tensor([0, 4, 9]))
    assert source.tolist() == [-1, 1, -1]
    assert rearranged(torch.tensor([1.0, 2.0, 3.0]), source).tolist() == [0.0, 2.0, 0.0]


def test_the_fraction_falls_with_a_cosine() -> None:
    assert fraction_at(0, 0.3, 100) == pytest.approx(0.3)
    assert fraction_at(50, 0.3, 100) == pytest.approx(0.15)
    assert fraction_at(25, 0.4, 100) == pytest.approx(0.2 * (1 + math.sqrt(0.5)))
    assert fraction_at(100, 0.3, 100) == pytest.approx(0)


# Against masked-dense


def ticket_of(model: nn.Module, density: float = 0.2, seed: int = 0) -> Ticket:
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.rand(weight.shape, generator=generator)
        for name, weight in zoo.prunable(model).items()
    }
    return Ticket.from_model(model, masks.from_scores(scores, 1 - density), {})


def images_of(steps: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(8, 1, 16, 16, generator=generator).to(dtype),
            torch.randint(0, 10, (8,), generator=generator),
        )
        for _ in range(steps)
    ]


def stepper_of(name: str, config: TrainingConfig, dtype: torch.dtype | None = None, **options):
    model = make_model(name, **CASES.get(name, {}), **options).to(dtype)
    ticket = ticket_of(model)
    stepper = PlainStepper(compact(model, ticket), config, STEPS)
    stepper.model.train()
    return stepper, ticket


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.mask() for name, weight in compact_weights(model)}


@pytest.mark.parametrize("name", CASES)
def test_it_is_masked_dense_rigl(name: str) -> None:
    """In float64, so that no choice hangs on rounding."""
    data = images_of(STEPS, torch.float64)
    stepper, ticket = stepper_of(name, RIGL, torch.float64)
    dense = make_model(name, **CASES[name]).double().train()
    floats = {n: mask.double() for n, mask in ticket.masks.items()}
    expected, by_update = masked_rigl(dense, floats, [[each] for each in data], RIGL, STEPS)
    assert len(by_update) == 3
    found = []
    for step, (images, labels) in enumerate(data, start=1):
        found.append(float(stepper.step(images, labels)))
        now = masks_of(stepper.model)
        if step % 3 == 0:
            for layer, mask in by_update[step // 3 - 1].items():
                assert torch.equal(now.get(layer, ticket.masks[layer]), mask), (step, layer)
    assert found == pytest.approx([loss for (loss,) in expected], abs=1e-5)
    moved = [entry["exchanged"] for entry in stepper.topology.history]
    assert len(moved) == 3 and min(moved) > 20
    trained = Ticket.from_compact(stepper.model, ticket, {})
    state = dense.state_dict()
    for layer, values in trained.values.items():
        torch.testing.assert_close(values, state[layer][trained.masks[layer]], rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["set", "rigl", "mest"])
@pytest.mark.parametrize("name", ["test_byobnet", "test_vit", "test_nfnet"])
def test_counts_and_shapes_stay_and_new_weights_start_at_zero(name: str, method: str) -> None:
    config = replace(RIGL, topology=method, ema=0.5, clip_grad=None)
    stepper, ticket = stepper_of(name, config)
    for images, labels in images_of(2):
        stepper.step(images, labels)
    before = masks_of(stepper.model)
    ((images, labels),) = images_of(1)
    stepper.step(images, labels)
    after = masks_of(stepper.model)
    moved = 0
    for layer, weight in stepper.topology.weights.items():
        mask, new = after[layer], (after[layer] & ~before[layer])[after[layer]]
        assert mask.sum() == ticket.masks[layer].sum() == len(weight.parameter)
        moved += int(new.sum())
        state = stepper.optimizer.state[weight.parameter]
        for tensor in (weight.parameter.detach(), state["exp_avg"], state["exp_avg_sq"]):
            assert not tensor[new].any(), layer
            assert tensor[~new].any() or not (~new).any(), layer
        averaged = stepper.ema.module.get_parameter(_name(stepper.model, weight.parameter))
        assert not averaged[new].any()
        assert weight.weights[0].fingerprint.tolist() == list(
            bytes.fromhex(masks.fingerprint({"": mask}))
        )
    assert moved == stepper.topology.history[0]["exchanged"] > 20
    assert masks_of(stepper.ema.module).keys() == after.keys()
    assert all(torch.equal(m, after[n]) for n, m in masks_of(stepper.ema.module).items())


def _name(model: nn.Module, wanted: nn.Parameter) -> str:
    return next(name for name, each in model.named_parameters() if each is wanted)


def losses(stepper: PlainStepper, data) -> list[float]:
    return [float(stepper.step(*each)) for each in data]


@pytest.mark.parametrize("changes", [{"rescatter": True}, {"scatter": "flat"}])
def test_other_ways_to_scatter_give_the_same_bits(changes: dict) -> None:
    expected, _ = stepper_of("test_byobnet", RIGL)
    found, _ = stepper_of("test_byobnet", replace(RIGL, **changes))
    assert losses(found, images_of(STEPS)) == losses(expected, images_of(STEPS))
    for layer, mask in masks_of(expected.model).items():
        assert torch.equal(masks_of(found.model)[layer], mask)


def test_channels_last_weights_follow() -> None:
    config = replace(RIGL, channels_last=True)
    expected, _ = stepper_of("test_byobnet", RIGL, torch.float64)
    found, _ = stepper_of("test_byobnet", config, torch.float64)
    data = images_of(STEPS, torch.float64)
    assert losses(found, data) == pytest.approx(losses(expected, data), abs=1e-9)
    for layer, mask in masks_of(expected.model).items():
        assert torch.equal(masks_of(found.model)[layer], mask)


def test_sparse_products_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autosparse.sparsity.compact.pays", lambda kept, shape: kept > 0)
    expected, _ = stepper_of("test_byobnet", RIGL, torch.float64)
    found, _ = stepper_of("test_byobnet", replace(RIGL, sparse_products=True), torch.float64)
    assert all(weight.pattern for _, weight in compact_weights(found.model))
    data = images_of(STEPS, torch.float64)
    assert losses(found, data) == pytest.approx(losses(expected, data), abs=1e-9)
    for layer, mask in masks_of(expected.model).items():
        assert torch.equal(masks_of(found.model)[layer], mask)


@pytest.mark.slow
def test_compiled_networks_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode=None: real(model, backend="eager"))
    expected, _ = stepper_of("test_vit", RIGL, torch.float64)
    found, _ = stepper_of("test_vit", replace(RIGL, compile=True), torch.float64)
    data = images_of(STEPS, torch.float64)
    assert losses(found, data) == pytest.approx(losses(expected, data), abs=1e-9)
    assert [each["exchanged"] for each in found.topology.history] == [
        each["exchanged"] for each in expected.topology.history
    ]


def test_activation_checkpointing_hears_every_gradient_once() -> None:
    expected, _ = stepper_of("test_vit", RIGL, torch.float64)
    found, _ = stepper_of("test_vit", replace(RIGL, grad_checkpointing=True), torch.float64)
    data = images_of(STEPS, torch.float64)
    assert losses(found, data) == pytest.approx(losses(expected, data), abs=1e-9)
    for layer, mask in masks_of(expected.model).items():
        assert torch.equal(masks_of(found.model)[layer], mask)


def test_dense_weights_exist_at_updates_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between updates the flat scatter is at work, at updates each weight by itself."""
    entered: list[int] = []
    enter = flat_scatter.FlatScatter.__enter__
    stepper, _ = stepper_of("test_byobnet", replace(RIGL, scatter="flat"))
    monkeypatch.setattr(
        flat_scatter.FlatScatter,
        "__enter__",
        lambda self: (entered.append(stepper.updates + 1), enter(self))[1],
    )
    losses(stepper, images_of(STEPS))
    assert entered == [1, 2, 4, 5, 7, 8, 10]
    assert all(each.listener.total is None for each in stepper.topology.weights.values())


# Paths


def test_what_grows_lies_on_a_path() -> None:
    config = replace(RIGL, topology="set", topology_on_paths=True, topology_fraction=0.9)
    dead = {}
    for on_paths in (True, False):
        ticket = ticket_of(make_model("test_vit"), density=0.02)
        model = compact(make_model("test_vit"), ticket)
        stepper = PlainStepper(model, replace(config, topology_on_paths=on_paths), STEPS)
        stepper.model.train()
        before = masks_of(model)
        losses(stepper, images_of(3))
        after = ticket.masks | masks_of(model)
        alive = live(make_model("test_vit"), after, (1, 16, 16))
        dead[on_paths] = sum(int((after[n] & ~before[n] & ~alive[n]).sum()) for n in before)
        assert stepper.topology.history[0]["exchanged"] > 20
    assert dead[True] == 0 < dead[False]


# Resume and ticket


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_a_resume_at_any_step_is_equal_in_every_bit(tmp_path: Path, stop: int) -> None:
    config = replace(RIGL, ema=0.9, topology="mest" if stop % 2 else "rigl", scatter="flat")
    data = images_of(STEPS)
    whole, ticket = stepper_of("test_byobnet", config)
    expected = losses(whole, data)
    cut, _ = stepper_of("test_byobnet", config)
    losses(cut, data[:stop])
    cut.save(tmp_path, History())
    again, _ = stepper_of("test_byobnet", config)
    assert again.load(tmp_path) is not None
    assert losses(again, data[stop:]) == expected[stop:]
    tickets = [Ticket.from_compact(each.model, ticket, {}) for each in (again, whole)]
    assert tickets[0].content_hash == tickets[1].content_hash
    assert tickets[0].card == tickets[1].card
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_the_trained_ticket_has_the_last_mask_and_its_history(tmp_path: Path) -> None:
    stepper, ticket = stepper_of("test_byobnet", RIGL)
    losses(stepper, images_of(STEPS))
    trained = Ticket.from_compact(stepper.model, ticket, {"seed": 3})
    trained.save(tmp_path / "trained.safetensors")
    found = Ticket.load(tmp_path / "trained.safetensors")
    assert found.kept == ticket.kept and found.fingerprint != ticket.fingerprint
    told = found.card["topology"]
    assert (told["method"], told["every"], told["grow_from"]) == ("rigl", 3, "gradient")
    assert [each["step"] for each in told["updates"]] == [3, 6, 9]
    last = masks_of(stepper.model)
    same = sum(int((mask & ticket.masks[name]).sum()) for name, mask in last.items())
    first = sum(int(ticket.masks[name].sum()) for name in last)
    assert told["updates"][-1]["overlap"] == same / first < 1
    model = compact(make_model(), found)  # What it is to be loaded into again.
    assert masks.fingerprint(masks_of(model)) == masks.fingerprint(last)


def test_a_state_dict_of_before_an_update_is_refused_after_it() -> None:
    stepper, _ = stepper_of("test_byobnet", RIGL)
    losses(stepper, images_of(2))
    before = {name: tensor.clone() for name, tensor in stepper.model.state_dict().items()}
    losses(stepper, images_of(1))
    with pytest.raises(UsageError, match="of another ticket"):
        stepper.model.load_state_dict(before)


def test_gradients_that_are_no_numbers_exchange_nothing() -> None:
    stepper, ticket = stepper_of("test_byobnet", replace(RIGL, clip_grad=None))
    data = images_of(3)
    losses(stepper, data[:2])
    data[2][0][0, 0, 0, 0] = math.inf
    losses(stepper, data[2:])
    assert stepper.topology.history == [{"step": 3, "exchanged": 0, "overlap": 1.0}]
    assert all(torch.equal(m, ticket.masks[n]) for n, m in masks_of(stepper.model).items())


# Settings


def test_static_is_the_default_and_moves_nothing() -> None:
    stepper, ticket = stepper_of("test_byobnet", replace(RIGL, topology="static"))
    losses(stepper, images_of(4))
    assert not stepper.topology.weights
    assert "topology" not in Ticket.from_compact(stepper.model, ticket, {}).card
    assert all(torch.equal(m, ticket.masks[n]) for n, m in masks_of(stepper.model).items())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"topology": "rigel"}, "unknown topology 'rigel'. Did you mean 'rigl'"),
        ({"topology_grow_from": "weights"}, "unknown topology_grow_from 'weights'"),
        ({"topology_sparsity": 1.0}, "topology_sparsity must be above 0 and below 1, got 1.0"),
        ({"topology_every": 0}, "topology_every must be at least 1"),
        ({"topology_fraction": 0.0}, "topology_fraction must be above 0"),
        ({"topology_until": 1.5}, "topology_until must be above 0 and at most 1"),
        ({"topology_gradient_weight": -1.0}, "topology_gradient_weight must be at least 0"),
        ({"optimizer": "rmsproptf"}, "optimizer rmsproptf does not keep"),
        ({"optimizer": "muon"}, "optimizer muon does not keep"),
    ],
)
def test_settings_that_cannot_be_are_one_line(changes: dict, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        check(replace(RIGL, **changes))
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_topology_that_never_moves_is_told(caplog: pytest.LogCaptureFixture) -> None:
    stepper_of("test_byobnet", replace(RIGL, topology_every=100))
    assert "rigl never moves: the first update is at step 100 of 10" in caplog.text
