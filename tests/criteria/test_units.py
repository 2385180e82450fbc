"""Units: by hand, exact counts, fewer units the higher the dial, and what slimming makes of it."""

from __future__ import annotations

from functools import lru_cache

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from autosparse import prune
from autosparse.core.errors import UsageError
from autosparse.criteria import base, register
from autosparse.criteria.config import PruneConfig
from autosparse.criteria.pruning import check
from autosparse.criteria.selection import Selection
from autosparse.criteria.units import Dial, rooms
from autosparse.data.sets import DataSource
from autosparse.models.zoo import prunable
from autosparse.sparsity import masks
from autosparse.sparsity.counts import keep_count
from autosparse.sparsity.slim import slim
from autosparse.sparsity.slim_groups import Coupled, coupled
from autosparse.sparsity.ticket import Ticket
from autosparse.study import axes, labels
from autosparse.study.config import StudyConfig
from autosparse.study.export import dense_model
from autosparse.study.grid import cells
from autosparse.study.measure import costs
from tests.conftest import few, make_model

pytestmark = pytest.mark.usefixtures("one_thread")


# By hand: two pixels, four hidden units, two classes


def mlp(first: list[list[float]], second: list[list[float]]) -> nn.Module:
    """A network of two linear layers whose weights are its scores (criterion magnitude)."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    model[1].weight.data, model[3].weight.data = torch.tensor(first), torch.tensor(second)
    return model


DATA = [(torch.rand(2, 1, 1, 2), torch.tensor([0, 1]))]


def by_hand(model: nn.Module, units: float, **selection) -> tuple[list, list]:
    chosen = Selection(units=units, **selection)
    ticket = prune(model, DATA, "magnitude", 0.625, selection=chosen)
    assert ticket.kept == 6
    return ticket.masks["1.weight"].int().tolist(), ticket.masks["3.weight"].int().tolist()


def test_by_hand() -> None:
    # Kept one by one: 4, 3, 3, and the first 1 of the first layer; 4, 4 of the second. Sums as
    # shares times what is kept: (4, 6, 1, 1) / 12 * 4 + (8, 2, 1, 1) / 12 * 2 = 2.7, 2.3, 0.5, 0.5.
    # Room of 4, 3, 2, 1 units: 16, 12, 8, 4 weights. Wanted: 16^(1 - units) * 6^units.
    model = mlp([[4.0, 0], [3, 3], [1, 0], [0, 1]], [[4.0, 1, 1, 0], [4, 1, 0, 1]])
    alone = by_hand(model, 0)
    assert alone == ([[1, 0], [1, 1], [1, 0], [0, 0]], [[1, 0, 0, 0], [1, 0, 0, 0]])
    assert by_hand(model, 0.25) == alone  # 12.5: all four units stay.
    assert by_hand(model, 0.5) == alone  # 9.8: three units.
    assert by_hand(model, 1) == ([[1, 1], [1, 1], [0, 0], [0, 0]], [[1, 0, 0, 0], [1, 0, 0, 0]])


def test_what_finds_no_room_goes_to_other_layers() -> None:
    # One by one: 9, 4, 4, 3, 3, 2: five and one. Two units have room for four in each layer.
    model = mlp([[4.0, 4], [3, 3], [2, 0], [0, 0]], [[9.0, 1, 0, 0], [1, 1, 0, 0]])
    assert by_hand(model, 0)[1] == [[1, 0, 0, 0], [0, 0, 0, 0]]
    assert by_hand(model, 1) == ([[1, 1], [1, 1], [0, 0], [0, 0]], [[1, 1, 0, 0], [0, 0, 0, 0]])


def test_of_equal_units_the_first_stay() -> None:
    model = mlp([[1.0, 1]] * 4, [[1.0] * 4] * 2)
    first, second = by_hand(model, 1)
    assert first == [[1, 1], [1, 1], [0, 0], [0, 0]]
    assert second == [[1, 1, 0, 0], [0, 0, 0, 0]]


def test_the_guard_of_channels_holds_for_those_that_stay() -> None:
    model = mlp([[4.0, 4], [3, 3], [2, 0], [0, 0]], [[9.0, 1, 0, 0], [1, 1, 0, 0]])
    first, second = by_hand(model, 1, guard="channel")
    assert [any(row) for row in first] == [True, True, False, False]
    assert all(any(row) for row in second)


# For any scores


@lru_cache
def byobnet() -> tuple[Coupled, dict[str, tuple[int, ...]]]:
    model = make_model()
    weights = prunable(model)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return coupled(model, weights, (1, 16, 16)), shapes


@given(
    st.integers(0, 99), st.floats(0.3, 0.99), st.floats(0.01, 1), st.floats(0.01, 1),
    st.sampled_from([0, 1]), st.booleans(),
)  # fmt: skip
def test_counts_are_exact_and_more_units_leave_fewer(
    seed: int, sparsity: float, one: float, other: float, least: int, signed: bool
) -> None:
    found, shapes = byobnet()
    generator = torch.Generator().manual_seed(seed)
    scores: dict[str, Tensor] = {
        name: torch.randn(shape, generator=generator) * 10 ** (number % 3)
        for number, (name, shape) in enumerate(shapes.items())
    }
    scores = scores if signed else {name: score.abs() for name, score in scores.items()}
    chosen = masks.from_scores(scores, sparsity, min_per_layer=least)
    low, high = (
        rooms(Dial(found, units), scores, chosen, min_per_layer=least)
        for units in sorted((one, other))
    )  # fmt: skip
    for each in (low, high):
        kept = masks.keep_counts(scores, each.counts, within=each.within)
        assert masks.kept(kept) == masks.kept(chosen)
        assert not any((kept[name] & ~room).any() for name, room in each.within.items())
        assert all(room.any() for room in each.within.values())
        assert not least or masks.first_empty(kept) is None
    assert high.left <= low.left <= low.of
    assert all((low.within[name] | ~room).all() for name, room in high.within.items())


def test_at_one_the_units_have_hardly_more_room_than_weights() -> None:
    found, shapes = byobnet()
    scores = {name: torch.rand(shape) for name, shape in shapes.items()}
    chosen = masks.from_scores(scores, 0.9)
    full = rooms(Dial(found, 1), scores, chosen)
    room = masks.kept(full.within)
    assert masks.kept(chosen) <= room < 1.05 * masks.kept(chosen)


# Tickets


def left_of(ticket: Ticket) -> tuple[int, int]:
    """Return the parameters and the FLOPs of the slimmed network."""
    recipe = ticket.card["model"]
    images = torch.zeros(2, recipe["in_chans"], recipe["image_size"], recipe["image_size"])
    small = slim(dense_model(ticket), images)
    found = costs(small, images)
    return found["parameters"], found["flops"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_byobnet", "test_vit"])
def test_slimmed_networks_get_smaller_with_units(digits: DataSource, name: str) -> None:
    model = make_model(name)
    found = [prune(model, digits, "snip", 0.9, units=units) for units in (0.0, 0.5, 1.0)]
    total = sum(weight.numel() for weight in prunable(model).values())
    assert {ticket.kept for ticket in found} == {keep_count(total, 0.9)}
    left = [left_of(ticket) for ticket in found]
    assert left[0][0] > 1.2 * left[1][0] > 1.2 * 1.2 * left[2][0]
    assert left[0][1] > left[1][1] > left[2][1]
    assert found[1].card["selection"]["units"] == 0.5
    living = [ticket.card["units_left"] for ticket in found[1:]]
    assert living[0][0] > living[1][0] and living[0][1] == living[1][1]


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["snip", "synflow", "erk", "autos"])
def test_a_resnet18_of_two_per_cent(digits: DataSource, criterion: str) -> None:
    model = make_model("resnet18")
    left = [left_of(prune(model, digits, criterion, 0.98, units=u)) for u in (0.0, 0.5, 1.0)]
    assert left[0] > left[1] > left[2]
    assert left[2][0] < 0.05 * sum(each.numel() for each in model.parameters())


def test_zero_is_the_ticket_of_before(digits: DataSource) -> None:
    model = make_model()
    plain = prune(model, digits, "snip", 0.9)
    assert prune(model, digits, "snip", 0.9, units=0.0).fingerprint == plain.fingerprint
    assert "units_left" not in plain.card


SELECTIONS = {
    "layer": Selection(scope="layer"),
    "erk": Selection(allocation="erk"),
    "uniform": Selection(allocation="uniform"),
    "channel": Selection(guard="channel"),
    "none": Selection(guard="none"),
    "live": Selection(guard="live"),
}


@pytest.mark.parametrize("kind", few(SELECTIONS, ["layer"]))
def test_with_every_selection(digits: DataSource, kind: str) -> None:
    selection = SELECTIONS[kind]
    model = make_model()
    ticket = prune(model, digits, "snip", 0.9, selection=selection, units=0.6)
    plain = prune(model, digits, "snip", 0.9, selection=selection)
    assert ticket.kept == plain.kept
    assert left_of(ticket)[0] < 0.8 * left_of(plain)[0]
    if selection.guard == "channel":
        for mask in ticket.masks.values():
            rows = mask.flatten(1).any(1)
            assert 0 < rows.sum() <= len(rows)
    if selection.guard == "live":
        plain = prune(model, digits, "snip", 0.9, units=0.6)
        assert ticket.card["effective_density"] >= plain.card["effective_density"]


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["live", "random"])
def test_autos_draws_again_inside_the_units(digits: DataSource, choice: str) -> None:
    model, options = make_model(), {"choice": choice}
    plain = prune(model, digits, "autos", 0.95, options=options)
    ticket = prune(model, digits, "autos", 0.95, options=options, units=1)
    assert ticket.kept == plain.kept
    assert masks.first_empty(ticket.masks) is None
    assert left_of(ticket)[0] < 0.5 * left_of(plain)[0]
    left, of = ticket.card["units_left"]
    assert 0 < left < of / 2
    if choice == "live":  # 3x3 kernels on one pixel are kept whole: eight of nine see padding.
        assert ticket.card["effective_density"] > 0.7 * ticket.kept / masks.total(ticket.masks)


# What cannot be


@pytest.mark.parametrize("criterion", ["short_irp", "autos_irp", "cts"])
def test_a_choice_refuses(criterion: str) -> None:
    said = f"^criterion {criterion} chooses the weights itself, so units 0.5 does not apply"
    with pytest.raises(UsageError, match=said):
        prune(make_model(), "digits", criterion, 0.9, units=0.5)
    with pytest.raises(UsageError, match=said):
        check(PruneConfig(criterion=criterion, units=0.5))


@pytest.mark.parametrize(
    ("selection", "named"),
    [
        (Selection(units=1.5), "units must be from 0"),
        (Selection(units=-0.1), "units must be from 0"),
        (Selection(units=0.5, pattern="2:4"), "leave out units"),
    ],
)
def test_selections_that_cannot_be(selection: Selection, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        prune(make_model(), "digits", "random", selection=selection)


class Untraced(nn.Sequential):
    """A network whose Python torch.export cannot follow."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if float(images.sum()) > 0 else images + 1)


@pytest.mark.parametrize(
    ("kind", "named"),
    [(nn.Sequential, "no unit of this network can go"), (Untraced, "cannot be traced")],
)
def test_networks_without_units_are_refused_before_any_score(kind: type, named: str) -> None:
    def loss(*_: object) -> Tensor:
        raise AssertionError("it was scored")

    model = kind(nn.Flatten(), nn.Linear(4, 3))
    batches = [(torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))]
    with pytest.raises(UsageError, match=named):
        prune(model, batches, "snip", 0.5, units=0.5, loss_fn=loss)


def test_an_own_criterion_may_have_an_option_of_that_name(digits: DataSource) -> None:
    asked = []

    @register("own_units", needs_data=False)
    def own_units(model, parameters, batches, loss_fn, *, units: int = 3) -> dict[str, Tensor]:
        asked.append(units)
        return {name: weight.detach().abs() for name, weight in parameters.items()}

    try:
        ticket = prune(make_model(), digits, "own_units", 0.9, options={"units": 7}, units=0.5)
    finally:
        del base._REGISTRY["own_units"]
    assert asked == [7]
    assert ticket.card["options"] == {"units": 7}
    left, of = ticket.card["units_left"]
    assert left < of


def test_units_is_no_option_of_a_criterion() -> None:
    with pytest.raises(UsageError, match="'units'"):
        prune(make_model(), "digits", "autos", 0.9, options={"units": 1})


# Studies


def test_an_axis_of_a_study_whose_zero_has_the_keys_of_before() -> None:
    study = StudyConfig(criteria=["snip", "autos"], sparsities=[0.9], seeds=[0], twins=["erk"])
    plain = {cell.key for cell in cells(study)}
    varied = StudyConfig(
        criteria=["snip", "autos"], sparsities=[0.9], seeds=[0], twins=["erk"],
        axes={"units": [0.0, 1.0]},
    )  # fmt: skip
    axes.check(varied)
    found = [cell.key for cell in cells(varied)]
    assert plain <= set(found)
    assert len(plain) == 4 and len(set(found)) == 7  # The dense network knows no units.


def test_irp_in_a_study_refuses() -> None:
    with pytest.raises(UsageError, match="irp prunes single weights"):
        labels.check(StudyConfig(criteria=["irp"], sparsities=[0.9], seeds=[0], units=0.5))


def test_dense_tickets_have_no_units() -> None:
    with pytest.raises(UsageError, match=r"keeps every weight, so units 0\.5 does not apply"):
        prune(make_model(), "digits", "dense", units=0.5)
    with pytest.raises(UsageError, match="does not apply"):
        check(PruneConfig(criterion="dense", units=0.5))
