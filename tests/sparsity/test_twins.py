"""Twins: what stays and what changes, by hand and by counting."""

from __future__ import annotations

import pytest
import torch

from autosparse.core.errors import UsageError
from autosparse.criteria import pruning
from autosparse.criteria.scoring import Selection, score
from autosparse.data.sets import DataSource
from autosparse.models import zoo
from autosparse.sparsity import masks, twins
from autosparse.sparsity.ticket import Ticket, compact
from tests.conftest import make_model


@pytest.fixture(scope="module")
def snip(digits: DataSource) -> Ticket:
    return pruning.prune(make_model(seed=5), digits, "snip", 0.9, seed=5)


def counts(ticket: Ticket) -> list[int]:
    return [int(mask.sum()) for mask in ticket.masks.values()]


def overlap(first: Ticket, second: Ticket) -> float:
    both = sum(int((a & second.masks[name]).sum()) for name, a in first.masks.items())
    return both / first.kept


def test_shuffling_moves_weights_inside_their_layer(snip: Ticket):
    twin = twins.shuffled_twin(snip, make_model(seed=5))
    assert counts(twin) == counts(snip)
    # By chance a layer of density d shares the fraction d of its kept weights with its shuffle.
    chance = sum(c * c / m.numel() for c, m in zip(counts(snip), snip.masks.values(), strict=True))
    assert overlap(snip, twin) == pytest.approx(chance / snip.kept, abs=0.02)
    assert overlap(snip, twin) < 0.6


def test_shuffling_takes_the_initial_values_at_the_new_places(snip: Ticket):
    model = make_model(seed=5)
    twin = twins.shuffled_twin(snip, model)
    for name, mask in twin.masks.items():
        assert torch.equal(twin.values[name], model.get_parameter(name).detach()[mask])


def test_a_shuffle_is_uniform_over_positions():
    mask = {"a": torch.arange(20) < 5}
    hits = sum(twins.shuffled(mask, seed)["a"].float() for seed in range(2000))
    # 2000 draws of 1/4: 500 each, standard deviation 19.4.
    assert (hits - 500).abs().max() < 5 * 19.4


def test_shuffles_are_fixed_by_the_seed_and_differ_between_layers_of_one_shape():
    mask = {name: torch.arange(64) < 8 for name in ("a", "b")}
    first, again, other = (twins.shuffled(mask, seed) for seed in (1, 1, 2))
    assert masks.fingerprint(first) == masks.fingerprint(again) != masks.fingerprint(other)
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], mask["a"])


def test_inversion_by_hand():
    scores = {"a": torch.tensor([[5.0, 1.0, 3.0], [2.0, 4.0, 0.0]]), "b": torch.tensor([1.0, 2.0])}
    chosen = {"a": torch.tensor([[1, 0, 1], [0, 1, 0]]).bool(), "b": torch.tensor([0, 1]).bool()}
    found = twins.inverted(scores, chosen)
    assert found["a"].int().tolist() == [[0, 1, 0], [1, 0, 1]]
    assert found["b"].int().tolist() == [1, 0]


def test_an_inverted_twin_at_half_density_is_the_rest(digits: DataSource):
    model = make_model(seed=1)
    scored, card = score(model, digits, "magnitude", 0.5, selection=Selection(scope="layer"))
    ticket = pruning.choose(model, scored, card)
    twin = twins.inverted_twin(ticket, model, scored.scores)
    for name, mask in ticket.masks.items():
        if mask.numel() % 2 == 0:
            assert torch.equal(twin.masks[name], ~mask)


def test_reinitialising_keeps_the_mask_and_nothing_else(snip: Ticket):
    twin = twins.reinitialised_twin(snip)
    assert twin.fingerprint == snip.fingerprint
    assert twin.card["model"]["seed"] != snip.card["model"]["seed"]
    for name, values in snip.values.items():
        if values.numel() > 4:
            assert not torch.equal(values, twin.values[name])
            # From the same distribution.
            assert twin.values[name].std() < 10 * values.std() + 1e-3
    compact(zoo.from_recipe(twin.card["model"]), twin)


def test_twins_say_whose_they_are(snip: Ticket):
    twin = twins.shuffled_twin(snip, make_model(seed=5))
    assert twin.card["twin"] == "shuffled"
    assert twin.card["twin_of"] == snip.fingerprint
    assert "effective_density" in snip.card and "effective_density" not in twin.card


def test_what_a_card_says_of_other_masks_is_left_out(snip: Ticket):
    marked = snip.with_card(dead="conv1.weight", units_left=[3, 4])
    shuffled = twins.shuffled_twin(marked, make_model(seed=5)).card
    assert "dead" not in shuffled and "units_left" not in shuffled
    reinitialised = twins.reinitialised_twin(marked).card
    assert (reinitialised["dead"], reinitialised["units_left"]) == ("conv1.weight", [3, 4])


def test_a_ticket_of_batches_cannot_be_drawn_anew(digits: DataSource):
    ticket = Ticket.from_model(make_model(), {}, {})
    with pytest.raises(UsageError, match="does not say how its model was initialised"):
        twins.reinitialised_twin(ticket)


def test_survival_breaks_ties_by_chance_and_keeps_the_order_of_levels():
    survival = {"a": torch.tensor([0, 0, 0, 0, 1, 1, 2, 3], dtype=torch.uint8)}
    scores = twins.survival_scores(survival, seed=3)["a"]
    assert (scores.floor() == survival["a"]).all()
    assert len(scores.unique()) == 8
    assert scores[:4].argsort().tolist() != [0, 1, 2, 3]


def test_another_default_device_does_not_matter(snip: Ticket):
    expected = twins.shuffled(snip.masks, 1)
    with torch.device("meta"):
        found = twins.shuffled(snip.masks, 1)
        survival = twins.survival_scores({"a": torch.zeros(4, device="cpu")}, 1)["a"]
    assert masks.fingerprint(found) == masks.fingerprint(expected)
    assert survival.device.type == "cpu"
