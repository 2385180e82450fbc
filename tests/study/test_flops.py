"""What trainings cost, against counts by hand."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autosparse import prune
from autosparse.data.sets import DataSource
from autosparse.models.zoo import prunable
from autosparse.sparsity.ticket import Ticket
from autosparse.study.cells import Cell
from autosparse.study.config import SparseTrainConfig
from autosparse.study.flops import of_training, per_image
from autosparse.study.trainings import train_cell
from autosparse.training.config import TrainingConfig
from autosparse.training.steppers import PlainStepper
from tests.conftest import SMALL_DIGITS, make_model


def test_an_image_by_hand() -> None:
    """A convolution to [2, 4, 4] of 3x3 kernels, half of it; and a linear layer 32 -> 3, whole."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 3)).train()
    mask = torch.zeros(2, 1, 3, 3, dtype=torch.bool)
    mask[0] = True
    conv, linear = 2 * 32 * 9, 2 * 3 * 32
    dense, sparse = per_image(model, {"0.weight": mask}, (1, 4, 4))
    assert (dense, sparse) == (conv + linear, conv // 2 + linear)
    assert model.training


def test_a_training_by_hand() -> None:
    """Of 1,000 images in steps of 10; two updates of a moving topology, on 20 images in all."""
    moved = {"grow_from": "gradient", "dense_gradients": True, "updates": [{}, {}]}
    assert of_training(100, 20, 1000, None, 10) == 3 * 20 * 1000
    assert of_training(100, 20, 1000, moved, 10) == 3 * 20 * 1000 + 80 * 20
    drawn = {**moved, "grow_from": "random", "dense_gradients": False}
    assert of_training(100, 20, 1000, drawn, 10) == 3 * 20 * 1000
    assert of_training(100, 20, 1000, {"updates": []}, 10) == 3 * 100 * 1000


def test_a_result_says_what_its_training_cost(tmp_path: Path, digits: DataSource) -> None:
    """Three epochs of RigL, 300 images each: two updates, after steps 3 and 6 of 9."""
    config = SparseTrainConfig(
        training=TrainingConfig(
            epochs=3, batch_size=100, checkpoint_epochs=0, sparse_products=False,
            topology="rigl", topology_every=3, topology_until=1.0,
        )
    )  # fmt: skip
    model = make_model()
    ticket = prune(model, digits, "erk", 0.9)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 1, digits.image_size, digits.image_size))
    cell = Cell("rigl", ticket, SMALL_DIGITS, 0, tmp_path)
    found = train_cell(
        cell, config, digits, lambda model, steps: PlainStepper(model, config.training, steps),
        device="cpu",
    )  # fmt: skip
    assert [entry["step"] for entry in found["topology"]["updates"]] == [3, 6]
    dense, sparse = counter.get_total_flops(), found["image_flops"]
    assert 0.05 * dense < sparse < 0.6 * dense
    layers = Ticket.load(tmp_path / "trained.safetensors").table()
    weights = sum(row["weights"] for row in layers)
    assert sum(row["kept"] for row in layers) < 0.11 * weights
    passes = found["training_passes"]
    assert found["training_flops"] == 3 * sparse * passes + (dense - sparse) * 2 * 100


def test_kernels_that_are_standardised_count_by_their_density() -> None:
    model = make_model("test_nfnet")
    masks = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in prunable(model).items()}
    for mask in masks.values():
        mask.view(-1)[: mask.numel() // 10] = True
    kinds = [type(module) for module in model.modules()]
    dense, sparse = per_image(model, masks, (1, 16, 16))
    assert 0.09 * dense < sparse < 0.11 * dense
    assert [type(module) for module in model.modules()] == kinds
