"""From dense to sparse in training: schedules by hand, exact counts, the ticket in the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from autosparse import prune
from autosparse.core.errors import UsageError
from autosparse.data.sets import DataSource
from autosparse.models import zoo
from autosparse.sparsity import masks
from autosparse.sparsity.ticket import Ticket, compact
from autosparse.study.cells import cells
from autosparse.study.config import ModelConfig, SparseTrainConfig
from autosparse.study.trainings import train_cell
from autosparse.training.config import TrainingConfig
from autosparse.training.steppers import History, PlainStepper
from autosparse.training.topology import ac_dc, gmp
from tests.conftest import SMALL_DIGITS, make_model
from tests.training.test_topology import images_of, losses, ticket_of

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 12
CONFIG = TrainingConfig(
    epochs=1, batch_size=8, schedule="none", sparse_products=False, topology="gmp",
    topology_every=2, topology_until=0.75, topology_sparsity=0.8, ema=0.5,
)  # fmt: skip


def dense_ticket(model: nn.Module) -> Ticket:
    whole = {n: torch.ones_like(w, dtype=torch.bool) for n, w in zoo.prunable(model).items()}
    return Ticket.from_model(model, whole, {})


def stepper_of(method: str, name: str = "test_byobnet") -> PlainStepper:
    stepper = PlainStepper(make_model(name), replace(CONFIG, topology=method), STEPS)
    stepper.model.train()
    return stepper


def test_gmp_by_hand() -> None:
    """0.8 (1 - (1 - t/8)^3) at t = 0, 4, 8; between, that of the last multiple of 2."""
    found = [gmp.sparsity(step, 2, 8, 0.8) for step in (0, 1, 4, 5, 8, 100)]
    assert found == pytest.approx([0, 0, 0.7, 0.7, 0.8, 0.8])


def test_ac_dc_by_hand() -> None:
    found = [ac_dc.sparsity(step, 2, 9, 0.8) for step in range(12)]
    assert found == [0, 0, 0.8, 0.8, 0, 0, 0.8, 0.8, 0, 0.8, 0.8, 0.8]


@pytest.mark.parametrize(("method", "name"), [("gmp", "test_byobnet"), ("gmp", "test_nfnet"),
                                             ("ac_dc", "test_vit")])  # fmt: skip
def test_the_ticket_has_the_asked_sparsity_and_nothing_else_is_left(method: str, name: str) -> None:
    stepper = stepper_of(method, name)
    start = dense_ticket(make_model(name))
    for step, batch in enumerate(images_of(STEPS), start=1):
        losses(stepper, [batch])
        wanted = stepper.topology._sparsity(step)
        kept = sum(int(mask.sum()) for mask in stepper.topology.masks.values())
        assert kept == masks.keep_count(start.kept, wanted), step
        for each, mask in stepper.topology.masks.items():
            weight = stepper.model.get_parameter(each)
            held = [weight.detach(), *stepper.optimizer.state[weight].values()]
            for tensor in (tensor for tensor in held if tensor.ndim):
                assert not tensor[mask == 0].any(), (step, each)
    trained = Ticket.from_compact(stepper.model, start, {}, stepper.state_dict())
    assert trained.kept == masks.keep_count(start.kept, 0.8)
    state = stepper.ema.module.state_dict()
    for each, mask in trained.masks.items():
        assert torch.equal(state[each] * mask, state[each]), "the average is sparse too"
        assert torch.equal(trained.values[each], state[each][mask])
    told = trained.card["topology"]
    assert told["cost"]["dense_image_passes"] == 8 * STEPS
    assert told["cost"]["mask_bytes"] == 4 * start.kept
    assert told["updates"][-1]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert len(told["updates"]) == {"gmp": 5, "ac_dc": 5}[method]


def test_the_average_is_evaluated_with_masked_kernels_as_its_ticket_is(tmp_path: Path) -> None:
    stepper, again = (stepper_of("gmp", "test_nfnet") for _ in range(2))
    start = dense_ticket(make_model("test_nfnet"))
    losses(stepper, images_of(STEPS))
    stepper.save(tmp_path, History())
    again.load(tmp_path)
    trained = Ticket.from_compact(stepper.model, start, {}, stepper.state_dict())
    alone, ((images, _),) = compact(make_model("test_nfnet"), trained).eval(), images_of(1)
    with torch.no_grad():
        wanted = alone(images)
        for each in (stepper, again):
            assert torch.allclose(each.evaluated().eval()(images), wanted, atol=1e-5)


def test_gmp_keeps_the_largest_over_all_layers() -> None:
    stepper = stepper_of("gmp")
    data = images_of(2)
    losses(stepper, data[:1])
    scores = {}
    exchange = stepper.topology.exchange

    def spied(*arguments, **options) -> None:
        scores.update({n: w.detach().abs().clone() for n, w in stepper.topology.weights.items()})
        exchange(*arguments, **options)

    stepper.topology.exchange = spied
    losses(stepper, data[1:])
    expected = masks.from_scores(scores, gmp.sparsity(2, 2, 9, 0.8))
    for name, mask in expected.items():
        assert torch.equal(stepper.topology.masks[name].bool(), mask)


@pytest.mark.parametrize("method", ["gmp", "ac_dc"])
@pytest.mark.parametrize("stop", [3, 7])
def test_a_resume_is_equal_in_every_bit(tmp_path: Path, method: str, stop: int) -> None:
    data = images_of(STEPS)
    whole, cut, again = (stepper_of(method) for _ in range(3))
    expected = losses(whole, data)
    losses(cut, data[:stop])
    cut.save(tmp_path, History())
    again.load(tmp_path)
    assert losses(again, data[stop:]) == expected[stop:]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_dense_cell_ends_as_a_sparse_ticket(tmp_path: Path, digits: DataSource) -> None:
    training = replace(CONFIG, batch_size=100, epochs=2, topology_every=1, checkpoint_epochs=0)
    config = SparseTrainConfig(
        model=ModelConfig("test_byobnet"), data=SMALL_DIGITS, training=training, out=str(tmp_path)
    )
    (cell,) = cells(config)
    train_cell(
        cell, config, digits, lambda model, steps: PlainStepper(model, training, steps),
        device="cpu",
    )  # fmt: skip
    trained = Ticket.load(cell.folder / "trained.safetensors")
    assert trained.sparsity == pytest.approx(0.8, abs=1e-3)
    assert trained.card["topology"]["method"] == "gmp"
    compact(make_model(), trained)
    result = cell.result()
    assert (result["sparsity"], result["kept"]) == (trained.card["sparsity"], trained.kept)
    assert result["sparsity"] == 0.8 and result["topology"]["method"] == "gmp"
    assert 0 < result["effective_density"] <= 1 - trained.sparsity


def test_a_pruned_model_is_refused() -> None:
    model = make_model()
    with pytest.raises(UsageError, match="topology gmp begins with the dense model"):
        PlainStepper(compact(model, ticket_of(model)), CONFIG, STEPS)


def test_what_is_told_of_a_moved_ticket_is_true_of_its_last_masks(
    tmp_path: Path, digits: DataSource
) -> None:
    """A card that says of the first masks what is not true of the last ones."""
    model = zoo.create(
        ModelConfig("test_byobnet"), num_classes=10, in_chans=1, image_size=digits.image_size,
        seed=0,
    )  # fmt: skip
    ticket = prune(model, digits, "erk", 0.9)
    card = {**ticket.card, "effective_density": 0.0, "dead": "stem.conv", "live": {}}
    replace(ticket, card=card).save(tmp_path / "first.safetensors")
    training = replace(
        CONFIG, topology="rigl", batch_size=100, epochs=2, topology_every=1, checkpoint_epochs=0
    )
    config = SparseTrainConfig(
        tickets=[str(tmp_path / "first.safetensors")], data=SMALL_DIGITS, training=training,
        out=str(tmp_path), dead="warn",
    )  # fmt: skip
    (cell,) = cells(config)
    with pytest.warns(UserWarning, match="dead"):
        train_cell(
            cell, config, digits, lambda model, steps: PlainStepper(model, training, steps),
            device="cpu",
        )  # fmt: skip
    result, trained = cell.result(), Ticket.load(cell.folder / "trained.safetensors")
    assert "dead" not in trained.card
    assert result["effective_density"] == trained.card["effective_density"] > 0
    assert result["trained_fingerprint"] == trained.fingerprint != result["fingerprint"]
    assert result["kept"] == ticket.kept
