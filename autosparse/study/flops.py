"""What a training costs in multiplications and additions, layer by layer at its own density."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.models import zoo
from autosparse.models.standardised import kernels_as_they_are
from autosparse.sparsity.ticket import Ticket
from autosparse.study.measure import layers
from autosparse.training.config import TrainingConfig
from autosparse.training.topology.base import STATIC

PASSES = 3
"""Forward, gradients of inputs, gradients of weights: each as many operations as the first."""


def per_image(
    model: nn.Module, masks: Mapping[str, Tensor], image_shape: tuple[int, int, int]
) -> tuple[int, int]:
    """Return the FLOPs of one image's forward pass: dense, and with the masks.

    Convolutions and linear layers are counted, 2 per weight and place; a layer with a mask counts
    by its density, another one whole.

    Args:
        model: dense.
        masks: bool, by parameter name, True = kept.
        image_shape: [C, H, W].
    """
    images = torch.zeros(1, *image_shape, device=next(model.parameters()).device)
    was, dense, sparse = model.training, 0, 0
    with kernels_as_they_are(model):
        rows = layers(model.eval(), images)
    for row in rows:
        mask = masks.get(row["layer"])
        dense += row["flops"]
        sparse += row["flops"] if mask is None else row["flops"] * int(mask.sum()) // mask.numel()
    model.train(was)
    return dense, sparse


def of_ticket(ticket: Ticket, config: TrainingConfig, images: int) -> dict[str, int]:
    """Return `image_flops`, one image through the network, and `training_flops`, all of a training.

    Args:
        ticket: trained; its card says what its topology did, if that moved.
        config: of the training.
        images: image passes of the training.
    """
    recipe = ticket.card["model"]
    shape = (recipe["in_chans"], recipe["image_size"], recipe["image_size"])
    dense, sparse = per_image(zoo.from_recipe(recipe), ticket.masks, shape)
    moved = ticket.card.get("topology") if config.topology != STATIC else None
    total = of_training(dense, sparse, images, moved, config.batch_size)
    return {"image_flops": sparse, "training_flops": total}


def of_training(
    dense: int, sparse: int, images: int, topology: Mapping[str, Any] | None, batch_size: int
) -> int:
    """Return the FLOPs of a training of so many images, validation left out.

    Three passes of the sparse network per image. Where weights grow by gradient, gradients of all
    weights are computed at updates (RigL, appendix H of arXiv 1911.11134): one dense pass instead
    of a sparse one. GMP and AC/DC are counted as they run here, as dense trainings.

    Args:
        dense: FLOPs of one image, forward.
        sparse: the same with the ticket's masks.
        images: image passes of the training.
        topology: what the trained ticket's card says of a topology that moved; None if static.
        batch_size: images of one step, of all ranks.
    """
    if topology is None:
        return PASSES * sparse * images
    if "grow_from" not in topology:
        return PASSES * dense * images
    listened = len(topology["updates"]) if topology.get("dense_gradients") else 0
    return PASSES * sparse * images + (dense - sparse) * listened * batch_size
