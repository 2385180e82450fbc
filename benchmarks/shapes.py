"""The models of docs/scale.md as shapes: counted on timm's own models, or by formula."""

from __future__ import annotations

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from autosparse.models.zoo import prunable
from benchmarks.cost_model import Shape

BATCH = 2
"""Batch norm on a 1 x 1 image wants more than one sample."""


def timm_shape(name: str, image_size: int, **options) -> Shape:
    """Count a timm model on the meta device, in bf16: no weight is made and nothing computed."""
    model = timm.create_model(name, pretrained=False, **options).to("meta", torch.bfloat16)
    model.train()
    images = torch.empty(BATCH, 3, image_size, image_size, device="meta", dtype=torch.bfloat16)
    own = {id(parameter) for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in own and not _views_one_of(tensor, model):
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images)
    weights = prunable(model)
    chosen = {id(weight) for weight in weights.values()}
    return Shape(
        name=name,
        layers=tuple(weight.numel() for weight in weights.values()),
        others=tuple(p.numel() for p in model.parameters() if id(p) not in chosen),
        flops=counter.get_total_flops() / BATCH,
        activation_bytes=sum(t.untyped_storage().nbytes() for t in saved.values()) / BATCH,
    )


def _views_one_of(tensor: torch.Tensor, model: torch.nn.Module) -> bool:
    """Return whether a tensor is, or is a view of, a parameter (a transposed weight, say)."""
    storage = tensor.untyped_storage()._cdata
    return any(storage == p.untyped_storage()._cdata for p in model.parameters())


def gpt(name: str, depth: int, width: int, context: int = 2048, vocabulary: int = 50257) -> Shape:
    """Return a GPT's shape; a sample is one context.

    Weights: 12 width² in a block (Brown et al. 2020, arXiv 2005.14165, table 2.1 has 32 blocks of
    2560 as its 2.7 B model); the head is the embedding. Operations: 2 per weight and token, head
    included, and 4 context x width in a block's attention (Chowdhery et al. 2022, arXiv
    2204.02311, appendix B). Activations: 34 x context x width bytes in a block, attention
    recomputed (Korthikanti et al. 2022, arXiv 2205.05198, table 2 without its 5as/h).
    """
    square = width * width
    layers = (3 * square, square, 4 * square, 4 * square) * depth
    embeddings = (vocabulary * width, context * width)
    biases = (3 * width, width, 4 * width, width) * depth
    norms = (width,) * (4 * depth + 2)
    multiplied = sum(layers) + vocabulary * width
    flops = context * (2 * multiplied + 4 * context * width * depth)
    activations = 34 * context * width * depth
    return Shape(name, layers, embeddings + biases + norms, float(flops), float(activations))


def resnet50() -> Shape:
    """Return timm's resnet50 at 224 px."""
    return timm_shape("resnet50", 224)


def vit_large() -> Shape:
    """Return timm's vit_large_patch16_224."""
    return timm_shape("vit_large_patch16_224", 224)


def gpt_2_7b() -> Shape:
    """Return the 2.7 B-weight transformer: 32 blocks of 2560."""
    return gpt("gpt_2.7b", depth=32, width=2560)
