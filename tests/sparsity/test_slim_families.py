"""Are timm's families slimmed exactly? A small model of each, pruned at random."""

from __future__ import annotations

import pytest
import torch

from autosparse import slim
from tests.sparsity.slimming import images_of, same_logits, spoilt
from tests.sparsity.test_timm_families import FAMILIES, fresh

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("density", "dead"), [(0.1, 6), (0.02, 0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_slimmed(family: str, density: float, dead: int) -> None:
    model, side = spoilt(fresh(family), density, dead), FAMILIES[family][1]
    images = images_of(side)
    small = slim(model, torch.zeros(2, 3, side, side))
    before, after = small.slimmed["parameters"]
    assert after < before
    same_logits(small, model, images)
