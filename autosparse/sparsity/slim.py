"""Exact slimming: channels, heads, hidden units and branches without effect are cut out.

Pruned weights are zeros in a dense network, which is as large and slow as before. Here all units go
that nobody listens to, or that say the same whatever the image is; what these add as a constant is
added further on. In eval mode the smaller network gives the same logits for every image.

The network is traced by `torch.export`, and what comes out is a graph module of plain PyTorch with
the names of before: `layer1.0.conv1.weight`, smaller. See docs/slimming.md.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor, fx, nn

from autosparse.core.errors import RunFailed, UsageError
from autosparse.models.contract import of_the_machine
from autosparse.models.restore import evaluating
from autosparse.models.zoo import check_values, device_of, expected_shape, unwrapped
from autosparse.sparsity.compact import compact_weights
from autosparse.sparsity.slim_choice import Choice
from autosparse.sparsity.slim_constants import facts
from autosparse.sparsity.slim_fold import fold
from autosparse.sparsity.slim_graph import rounded, traced
from autosparse.sparsity.slim_moves import Moves
from autosparse.sparsity.slim_rewrite import rewrite

CHANNELS = 4
"""Channels of convolutions stay multiples of this: ONNX Runtime has blocked kernels for these only
(onnxruntime/core/optimizer/nchwc_transformer.cc), and 9 channels take longer than 12."""
TOLERANCE = 1e-5
"""How far logits may be from those of before, relative to their size, in float32."""
EXACT, LEAST = 1e-7, 1e-4
"""The same in float64, before new tensors are rounded; logits below the second count as that."""


def slim(
    model: nn.Module, images: Tensor | None = None, *, multiple: int = CHANNELS
) -> fx.GraphModule:
    """Return a smaller network with the same logits in eval mode; `model` is not changed.

    Args:
        model: dense (see `densify`), with zeros where it is pruned. It gives one tensor.
        images: two or more [N, C, H, W], of which only the shape counts; by default of the size
            that the model was built for. The smaller network takes images of this size, in batches
            of any.
        multiple: a convolution that loses channels keeps a multiple of this, where it has as many;
            1: every channel without effect goes, which is the smallest network, not the fastest.

    Returns a graph module. Its `slimmed` attribute tells parameters before and after, the shapes
    that changed, and which operators kept all they read as it was.
    Raises UsageError where the network cannot be traced, RunFailed should logits differ.
    """
    if not isinstance(multiple, Integral) or multiple < 1:
        raise UsageError(f"multiple {multiple}: give a whole number from 1 on")
    model = unwrapped(model)
    check_values(model)
    made_compact = next(compact_weights(model), None)
    if made_compact is not None:
        raise UsageError(
            f"the model is compact (at {made_compact[0]}); slim autosparse.densify(model)"
        )
    images = random_images(model, images)
    small = traced(model, images)
    try:
        _make_smaller(small, images, multiple)
    except Exception as error:
        if isinstance(error, UsageError | RunFailed) or of_the_machine(error):
            raise
        line = " ".join(str(error).split())[:200]
        raise RunFailed(
            f"slimming {type(model).__name__} broke ({type(error).__name__}: {line}): that is a "
            "fault of slimming; export it without"
        ) from error
    check_logits(model, small, images, "export it without")
    return small


def _make_smaller(small: fx.GraphModule, images: Tensor, multiple: int) -> None:
    """Make a graph smaller, in place, and tell in its `slimmed` how much."""
    before = {name: tuple(tensor.shape) for name, tensor in small.named_parameters()}
    first = facts(small, images)
    fold(small, first)
    known = facts(small, images)
    rules = Moves(small, known)
    rewrite(small, known, rules, Choice(rules, multiple))
    _check_exactly(first.output, facts(small, images).output)
    rounded(small)
    small.slimmed = _report(before, small, dict(rules.kept_whole))  # type: ignore[assignment]


def _check_exactly(expected: Any, given: Any) -> None:
    """Raise RunFailed where what the smaller graph gives in float64 is something else."""
    off = [
        float((one - other).abs().max() / one.abs().max().clamp(min=LEAST))
        for one, other in zip(_tensors(expected), _tensors(given), strict=True)
        if one.numel()
    ]
    if not all(each <= EXACT for each in off):
        raise RunFailed(
            f"slimming changed a logit by {max(off):.3g} of the largest in float64: that is a "
            "fault of slimming; export it without"
        )


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, list | tuple):
        return [tensor for each in output for tensor in _tensors(each)]
    return [output] if isinstance(output, Tensor) else []


def random_images(model: nn.Module, images: Tensor | None = None) -> Tensor:
    """Return random images [2 or more, C, H, W] of the shape of `images`, or that a model takes."""
    device, dtype = device_of(model), next(model.parameters()).dtype
    if images is None:
        shape = expected_shape(model)
        if shape is None:
            raise UsageError(
                f"{type(model).__name__} does not tell what images it takes: give `images`"
            )
        images = torch.zeros(2, *shape)
    generator = torch.Generator().manual_seed(0)
    shape = (max(2, len(images)), *images.shape[1:])
    return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)


@torch.no_grad()
def check_logits(
    model: nn.Module, small: nn.Module, images: Tensor, instead: str, least: float = 1.0
) -> None:
    """Raise RunFailed, which says what to do instead, unless both give the same logits.

    `small` is in eval mode; `model` is put into it for a moment. What differs is held against the
    largest logit, or `least` where all are smaller.
    """
    with evaluating(model):
        expected = model(images)
    if not isinstance(expected, Tensor):
        raise UsageError(f"{type(model).__name__} gives no tensor of logits, so it is not slimmed")
    off = float((small(images) - expected).abs().max())
    size = max(least, float(expected.abs().max()))
    rounding = torch.finfo(images.dtype).eps / torch.finfo(torch.float32).eps
    if not off <= TOLERANCE * size * max(1.0, rounding):
        raise RunFailed(
            f"slimming {type(model).__name__} changed a logit by {off:.3g}, of {size:.3g} at most: "
            f"that is a fault of slimming; {instead}"
        )


def _report(
    before: dict[str, tuple[int, ...]], small: nn.Module, kept_whole: dict[str, int]
) -> dict[str, Any]:
    after = {name: tuple(tensor.shape) for name, tensor in small.named_parameters()}
    return {
        "parameters": [sum(torch.Size(s).numel() for s in x.values()) for x in (before, after)],
        "changed": {
            name: [list(shape), list(after[name]) if name in after else None]
            for name, shape in before.items()
            if after.get(name) != shape
        },
        "kept_whole": kept_whole,
    }
