"""Do timm's families, as timm makes them, prune, train compact and go back? A small model of each.

Families that are not here need more than a second a step, or images above 224 px, at their
smallest: byoanet, convmixer, csatv2, deepseek's and gemma's larger towers, dpn, focalnet, gcvit,
hrnet, the other inceptions, lowformer, mobilenetv5, mvitv2, nasnet, nest, nextvit, pnasnet, rdnet,
res2net, resnest, selecsls, sknet, tresnet, vgg, vitamin, volo, xception.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from autosparse import prune
from autosparse.core.errors import UsageError
from autosparse.models import roles, zoo
from autosparse.models.standardised import STANDARDISED, differs_from_plain, kernels_masked
from autosparse.sparsity import masks, reach
from autosparse.sparsity.compact import densify
from autosparse.sparsity.ticket import Ticket, compact

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CLASSES = 10
FAMILIES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "beit": (
        "beit_base_patch16_224",
        64,
        {"img_size": 64, "embed_dim": 96, "depth": 2, "num_heads": 3},
    ),
    "byobnet": ("repvgg_a0", 64, {}),
    "cait": ("cait_xxs24_224", 64, {"img_size": 64, "depth": 2, "embed_dim": 96, "num_heads": 2}),
    "coat": ("coat_lite_tiny", 64, {"img_size": 64, "serial_depths": (1, 1, 1, 1)}),
    "convit": (
        "convit_tiny",
        64,
        {"img_size": 64, "depth": 3, "local_up_to_layer": 2, "embed_dim": 24, "num_heads": 2},
    ),
    "convnext": ("convnext_zepto_rms", 64, {}),
    "cpubone": ("cpubone_nano", 64, {}),
    "crossvit": (
        "crossvit_tiny_240",
        240,
        {"embed_dim": (32, 64), "depth": ((1, 1, 0),), "num_heads": (2, 2)},
    ),
    "cspnet": ("cs3darknet_focus_s", 64, {}),
    "cspnext": ("cspnext_tiny", 64, {}),
    "davit": (
        "davit_tiny",
        64,
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8)},
    ),
    "deepseek_vit": ("deepseek_vit_412m", 56, {"embed_dim": 64, "depth": 2, "num_heads": 2}),
    "deit": ("deit_tiny_distilled_patch16_224", 64, {"img_size": 64, "depth": 2}),
    "densenet": ("densenet121", 64, {"block_config": (2, 2, 2, 2)}),
    "dla": ("dla46_c", 64, {}),
    "edgenext": ("edgenext_xx_small", 64, {}),
    "efficientformer": (
        "efficientformer_l1",
        224,
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 96)},
    ),
    "efficientformer_v2": ("efficientformerv2_s0", 64, {"img_size": 64}),
    "efficientnet": ("mobilenetv2_035", 64, {}),
    "efficientvim": ("efficientvim_m1", 64, {}),
    "efficientvit_mit": ("efficientvit_b0", 64, {}),
    "efficientvit_msra": ("efficientvit_m0", 128, {"img_size": 128}),
    "eva": ("eva02_tiny_patch14_224", 56, {"img_size": 56, "depth": 2}),
    "fasternet": ("fasternet_t0", 64, {}),
    "fastvit": ("fastvit_t8", 64, {}),
    "ghostnet": ("ghostnet_050", 64, {}),
    "hardcorenas": ("hardcorenas_b", 64, {}),
    "hgnet": ("hgnetv2_b0", 64, {}),
    "hiera": ("hiera_tiny_224", 64, {"img_size": 64, "stages": (1, 1, 1, 1), "embed_dim": 24}),
    "hieradet_sam2": (
        "sam2_hiera_tiny",
        64,
        {"embed_dim": 24, "stages": (1, 1, 2, 1), "global_att_blocks": (3,)},
    ),
    "iformer": ("iformer_t", 64, {}),
    "inception_next": ("inception_next_atto", 64, {}),
    "lcnetv2": ("lcnetv2_small", 64, {}),
    "levit": ("levit_128s", 224, {}),
    "mambaout": ("mambaout_femto", 64, {}),
    "maxxvit": ("maxvit_rmlp_pico_rw_256", 64, {"img_size": 64}),
    "metaformer": ("poolformer_s12", 32, {}),
    "mlp_mixer": ("gmlp_ti16_224", 64, {"img_size": 64}),
    "mobilenetv3": ("lcnet_035", 64, {}),
    "mobilevit": ("mobilevit_xxs", 64, {}),
    "naflexvit": (
        "naflexvit_base_patch16_parfac_gap",
        64,
        {"embed_dim": 64, "depth": 2, "num_heads": 2},
    ),
    "nfnet": ("nf_regnet_b0", 64, {}),
    "pit": ("pit_ti_224", 64, {"img_size": 64, "depth": (1, 1, 1)}),
    "pvt_v2": ("pvt_v2_b0", 64, {}),
    "qwen3_vit": ("qwen3_vit_88m", 64, {"embed_dim": 64, "depth": 2, "num_heads": 2}),
    "regnet": ("regnetx_002", 64, {}),
    "repghost": ("repghostnet_050", 64, {}),
    "repvit": ("repvit_m1", 64, {}),
    "resnet": ("resnet10t", 64, {}),
    "resnetv2": ("resnetv2_50", 64, {"layers": (1, 1, 1, 1)}),
    "rexnet": ("rexnet_100", 64, {}),
    "senet": ("legacy_seresnet18", 64, {}),
    "sequencer": (
        "sequencer2d_s",
        64,
        {
            "img_size": 64,
            "layers": (1, 1, 1, 1),
            "embed_dims": (24, 48, 48, 48),
            "hidden_sizes": (6, 12, 12, 12),
        },
    ),
    "shvit": ("shvit_s1", 64, {}),
    "starnet": ("starnet_s050", 64, {}),
    "swiftformer": ("swiftformer_xs", 64, {}),
    "swin_transformer": (
        "swin_tiny_patch4_window7_224",
        64,
        {
            "img_size": 64,
            "window_size": 4,
            "embed_dim": 24,
            "depths": (1, 1, 2, 1),
            "num_heads": (1, 2, 4, 8),
        },
    ),
    "swin_transformer_v2": (
        "swinv2_tiny_window8_256",
        64,
        {"img_size": 64, "embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)},
    ),
    "swin_transformer_v2_cr": (
        "swinv2_cr_tiny_224",
        64,
        {"img_size": 64, "embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)},
    ),
    "tiny_vit": ("tiny_vit_5m_224", 64, {"depths": (1, 1, 2, 1)}),
    "tnt": (
        "tnt_s_legacy_patch16_224",
        64,
        {"img_size": 64, "depth": 2, "embed_dim": 96, "num_heads_outer": 2},
    ),
    "twins": (
        "twins_svt_small",
        64,
        {
            "img_size": 64,
            "depths": (1, 1, 2, 1),
            "embed_dims": (16, 32, 64, 128),
            "num_heads": (1, 2, 4, 8),
        },
    ),
    "visformer": ("visformer_tiny", 64, {"img_size": 64, "depth": (1, 1, 1), "embed_dim": 96}),
    "vision_transformer": (
        "vit_base_patch16_siglip_224",
        64,
        {"img_size": 64, "embed_dim": 96, "depth": 2, "num_heads": 3},
    ),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 64, {"img_size": 64, "depth": 2}),
    "vision_transformer_relpos": (
        "vit_relpos_small_patch16_224",
        64,
        {"img_size": 64, "embed_dim": 96, "depth": 2, "num_heads": 3},
    ),
    "vision_transformer_sam": (
        "samvit_base_patch16",
        64,
        {
            "img_size": 64,
            "embed_dim": 96,
            "depth": 2,
            "num_heads": 3,
            "global_attn_indexes": (1,),
            "window_size": 2,
        },
    ),
    "vovnet": ("ese_vovnet19b_slim_dw", 64, {}),
    "xcit": ("xcit_nano_12_p16_224", 64, {"img_size": 64, "depth": 2, "embed_dim": 48}),
}
"""Family -> model, side of the images, options that make it small."""
CRITERIA: dict[str, dict[str, Any]] = {"snip": {}, "synflow": {"rounds": 12}, "autos": {}}
UNABLE = {
    ("efficientvit_mit", "synflow"): "synflow has no scores for EfficientVit, .* is not finite",
    ("levit", "synflow"): "synflow has no scores for LevitDistilled, .*gradient.* is not finite",
}
"""What cannot be, and the line that says so: linear attention multiplies three positive signals,
and without norms the slope of a softmax grows from block to block."""
SAY_NOTHING: dict[str, list[str]] = {
    "coat": [f"crpe4.conv_list.{number}.weight" for number in range(3)],
}
"""Layers that SNIP sees no gradient of at this size (a single token), and says so."""


def fresh(family: str, seed: int = 0) -> nn.Module:
    name, _, options = FAMILIES[family]
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=CLASSES, **options)


def batch(family: str) -> tuple[Tensor, Tensor]:
    side, generator = FAMILIES[family][1], torch.Generator().manual_seed(0)
    return torch.randn(4, 3, side, side, generator=generator), torch.arange(4)


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    found = model.eval()(images)
    return found[0] if isinstance(found, tuple) else found


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Within 1e-4 of the largest logit, or of one."""
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * scale)


def exact(total: int, sparsity: float) -> int:
    """Return what is left of `total`, in whole numbers; halves are removed."""
    return total - (2 * total * round(sparsity * 100) + 100) // 200


def masked_dense(model: nn.Module, ticket: Ticket) -> nn.Module:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in ticket.masks.items():
            twin.get_parameter(name).mul_(mask)
    return twin


def standardises(model: nn.Module) -> bool:
    return any(isinstance(module, STANDARDISED) for module in model.modules())


def pruned(model: nn.Module, family: str, criterion: str, sparsity: float) -> Ticket:
    """Prune; every warning must be one that is expected."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        data = [batch(family)]
        ticket = prune(model, data, criterion, sparsity, options=CRITERIA[criterion])
    lines = [str(each.message) for each in told]
    assert any("ticket is dead" in line for line in lines) == ("dead" in ticket.card)
    assert "paths" not in ticket.card and "chosen_without_paths" not in ticket.card, lines
    assert "ties" not in ticket.card, ticket.card["ties"]
    assert set(ticket.card.get("level", ())) <= set(SAY_NOTHING.get(family, ()))
    return ticket


@pytest.mark.timeout(300)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_pruned_and_compact(family: str, criterion: str, monkeypatch) -> None:
    monkeypatch.setattr(reach, "thinned", partial(reach.thinned, rounds=4))  # 32 take too long.
    model = fresh(family)
    if (family, criterion) in UNABLE:
        with pytest.raises(UsageError, match=UNABLE[family, criterion]):
            pruned(model, family, criterion, 0.9)
        return
    images, total = batch(family)[0], masks.total(zoo.prunable(model))
    for sparsity in (0.9, 0.98):
        ticket = pruned(model, family, criterion, sparsity)
        assert ticket.kept == exact(total, sparsity)
        small = compact(copy.deepcopy(model), ticket)
        if standardises(model):
            assert_same(logits(small, images), logits(densify(copy.deepcopy(small)), images))
        else:
            assert_same(logits(small, images), logits(masked_dense(model, ticket), images))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_back_into_timm_after_three_steps(family: str) -> None:
    model, (images, labels) = fresh(family), batch(family)
    small = compact(model, pruned(model, family, "snip", 0.9)).train()
    optimizer = torch.optim.SGD(small.parameters(), lr=1e-3)
    for _ in range(3):
        outputs = small(images)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        optimizer.zero_grad()
        nn.functional.cross_entropy(outputs, labels).backward()
        optimizer.step()
    expected = logits(small, images)
    dense = densify(small)
    assert_same(logits(dense, images), expected)
    plain = fresh(family, seed=1)
    plain.load_state_dict(dense.state_dict())
    if not standardises(plain):
        assert_same(logits(plain, images), expected)
    elif differs_from_plain(dense) is None:
        pytest.fail("kernels that are masked after they are standardised are no plain ones")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_called_dead_has_no_gradient_that_depends_on_the_image(family: str) -> None:
    """The network itself, in float64: hidden layers revealed, nothing added to the signal.

    Whatever changes the output by more than a constant must be live. The other way round does
    not hold: a unit that is shut for two images is live all the same.
    """
    model = fresh(family).double().eval()
    if standardises(model):
        pytest.skip("a weight changes its filter's scale, whatever it reads")
    images = batch(family)[0][:2].double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = roles.of(model, images[:1])
        values = zoo.revealing(model, images[:1], roles.FAINT)
        values |= {n: torch.zeros_like(model.get_parameter(n)) for n in found.shifts}
        scores = {n: torch.rand(w.shape) for n, w in zoo.prunable(model).items()}
        chosen = masks.keep_counts(scores, {n: -(-s.numel() // 20) for n, s in scores.items()})
    live = reach.live(model, chosen, tuple(images.shape[1:]))
    roles.set_values(model, values)
    real = masked_dense(model, Ticket(chosen, {}, {}))
    weights = {name: real.get_parameter(name) for name in chosen}
    with kernels_masked(real):
        one, other = (_gradients(real, weights, image) for image in images.split(1))
    largest = max(float(each.abs().max()) for each in one.values())
    for name, mask in chosen.items():
        moves = (one[name] - other[name]).abs() > 1e-12 * largest  # Beyond rounding.
        assert not (moves & mask & ~live[name]).any(), name


def _gradients(model: nn.Module, weights: dict[str, nn.Parameter], image: Tensor) -> dict:
    outputs = model(image)
    outputs = outputs[0] if isinstance(outputs, tuple) else outputs
    factors = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1)).double()
    found = torch.autograd.grad(
        (outputs * factors).sum(), list(weights.values()), materialize_grads=True
    )
    return dict(zip(weights, found, strict=True))
