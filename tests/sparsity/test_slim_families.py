"""Are timm's families slimmed exactly? A small model of each, pruned at random.

Nearly all of the time is `torch.export`'s, so some families get fewer blocks than in
test_timm_families: maxxvit (15 s of one core otherwise), efficientformer_v2 and levit (over 7 s).
ghostnet is left out (16 s): it overwrites parts of what it reads, so it is traced twice.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from autosparse import slim
from tests.sparsity.slimming import images_of, same_logits, spoilt
from tests.sparsity.test_timm_families import CLASSES, FAMILIES

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

LEFT_OUT = {"ghostnet"}
FEWER_BLOCKS: dict[str, dict[str, Any]] = {
    "efficientformer_v2": {"depths": (1, 1, 2, 2)},
    "levit": {"depth": (1, 1, 1)},
    "maxxvit": {"depths": (1, 1, 1, 1)},
}
NO_LAYER_DEAD = ["densenet", "hgnet", "nfnet", "resnet", "vision_transformer"]
"""Convolutions that are joined, added up, standardised; attention: at 2 % no layer is dead whole,
so single units go."""


def small_model(family: str) -> nn.Module:
    name, _, options = FAMILIES[family]
    torch.manual_seed(0)
    options = options | FEWER_BLOCKS.get(family, {})
    return timm.create_model(name, num_classes=CLASSES, **options)


def is_slimmed(family: str, density: float, dead: int) -> None:
    model, side = spoilt(small_model(family), density, dead), FAMILIES[family][1]
    small = slim(model, torch.zeros(2, 3, side, side))
    before, after = small.slimmed["parameters"]
    assert after < before
    same_logits(small, model, images_of(side))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - LEFT_OUT))
def test_a_family_with_dead_layers_is_slimmed(family: str) -> None:
    is_slimmed(family, density=0.1, dead=6)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", NO_LAYER_DEAD)
def test_a_family_with_few_weights_is_slimmed(family: str) -> None:
    is_slimmed(family, density=0.02, dead=0)
