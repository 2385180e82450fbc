"""Per-weight features: what AutoS sees of a weight at initialization.

Two kinds. `paper` (arXiv 2408.14757): the initial weight and the initial gradient, as they are.
`context` (ours): the same two freed of their scale, the strength of the weight's output and
input channel, and the shape, depth and gradient mass of its layer; so that a scorer fitted on
one network can read another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from autosparse.core.errors import unknown
from autosparse.models.contract import outputs_of
from autosparse.models.gradients import spend
from autosparse.models.restore import evaluating
from autosparse.models.zoo import called

KINDS: dict[str, tuple[str, ...]] = {
    "paper": ("weight", "gradient"),
    "context": (
        "abs_weight",
        "abs_gradient",
        "weight_times_gradient",
        "out_channel_weight",
        "out_channel_gradient",
        "in_channel_weight",
        "in_channel_gradient",
        "layer_size",
        "layer_share",
        "fan_in",
        "fan_out",
        "kernel",
        "depth",
        "layer_sensitivity",
    ),
}
"""Kind -> names of its inputs. A scorer's card holds them, so that a change is noticed."""

VARYING = 7
"""The first so many `context` features differ from weight to weight; the others are constants of
the layer."""
CHUNK = 1 << 16
"""Weights whose features are computed at a time, so that they stay in a core's cache."""
TINY = 1e-12
"""Keeps quotients and logarithms of zeros finite."""


LOG_SIZE, LOG_SHARE, LOG_FAN_IN, LOG_FAN_OUT = 4, -1, 2, 1.5
"""Where inputs on a layer are zero: log10 of its weights, its share of all, its fan-in and fan-out.

Set by hand, about a middle layer of a small network; the fit standardises its inputs again.
"""
LIMIT = 3.0
"""Largest size of inputs that are logarithms of ratios: e^3 is twenty times. Set by hand."""
Constants: TypeAlias = "tuple[float, ...]"
"""Inputs that are the same for all weights of a layer, already scaled."""


def names_of(kind: str) -> tuple[str, ...]:
    """Return the inputs of a kind; raise UsageError when there is no such kind."""
    if kind not in KINDS:
        raise unknown("kind of features", kind, KINDS)
    return KINDS[kind]


def contexts(
    weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> dict[str, Constants]:
    """Return the constants of every layer of one model, from all of its prunable weights."""
    total = sum(weight.numel() for weight in weights.values())
    mass = {
        name: float((_precise(weight.detach()) * gradients[name]).abs().mean())
        for name, weight in weights.items()
    }
    mean_mass = sum(mass[name] * weight.numel() for name, weight in weights.items()) / total
    by_layer = {}
    for place, (name, weight) in enumerate(weights.items()):
        fan_out, fan_in = weight.shape[0], weight.shape[1]
        kernel = math.prod(weight.shape[2:])
        sensitivity = math.log10(max(mass[name], TINY) / max(mean_mass, TINY))
        by_layer[name] = (
            math.log10(weight.numel()) - LOG_SIZE,
            math.log10(weight.numel() / total) - LOG_SHARE,
            math.log10(fan_in * kernel) - LOG_FAN_IN,
            math.log10(fan_out) - LOG_FAN_OUT,
            math.log10(kernel),
            place / max(len(weights) - 1, 1),
            min(max(sensitivity, -LIMIT), LIMIT),
        )
    return by_layer


@torch.no_grad()
def uses(model: nn.Module, names: Iterable[str], image: Tensor) -> dict[str, float]:
    """Return at how many places of its output a layer's weights are used, for one image.

    For a convolution the pixels of its output, for a linear layer of a transformer the tokens.
    Modules that share a weight are added up. Layers whose module is not called get the geometric
    mean of the others.

    Args:
        model: it is called once, in eval mode, and left as it was.
        names: of prunable parameters.
        image: [1, C, H, W].
    """
    places = dict.fromkeys(names, 0.0)

    def note(name: str) -> Callable:
        channels = 1 if model.get_parameter(name).ndim > 2 else -1

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            signal = output[0] if isinstance(output, tuple) else output
            places[name] += signal.numel() / signal.shape[channels]

        return hook

    first = {id(model.get_parameter(name)): name for name in places}
    holders = {  # A module may have several names, too.
        (called(model, name), first[id(parameter)])
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in first
    }
    hooks = [module.register_forward_hook(note(name)) for module, name in holders]
    try:
        with evaluating(model):
            outputs_of(model, image)
    finally:
        for each in hooks:
            each.remove()
    spend(1)
    seen = [math.log(count) for count in places.values() if count]
    usual = math.exp(sum(seen) / len(seen)) if seen else 1.0
    return {name: count or usual for name, count in places.items()}


def layer_features(
    kind: str, weight: Tensor, gradient: Tensor, constants: Constants | None
) -> Iterator[Tensor]:
    """Yield the features of one layer in pieces of shape [F, n], weights in row-major order.

    Args:
        kind: a key of KINDS; F is the number of its inputs.
        weight: initial weight [out, in, *kernel].
        gradient: initial gradient, of the same shape.
        constants: of this layer, from `contexts`; None leaves these inputs, the last, out.
    """
    weight, gradient = weight.detach().float(), gradient.detach().float()
    if names_of(kind) == KINDS["paper"]:
        pair = torch.stack([weight.flatten(), gradient.flatten()])
        yield from pair.split(CHUNK, dim=1)
        return
    w = weight.flatten(2) if weight.ndim > 2 else weight[..., None]
    g = gradient.view_as(w)
    scale_w, scale_g = _rms(w), _rms(g)
    scale_wg = _rms(w * g)
    channels = (
        _relative(w, (1, 2), scale_w),
        _relative(g, (1, 2), scale_g),
        _relative(w, (0, 2), scale_w),
        _relative(g, (0, 2), scale_g),
    )
    rows = max(1, CHUNK // (w.shape[1] * w.shape[2]))
    for start in range(0, w.shape[0], rows):
        part = slice(start, start + rows)
        yield _context_piece(
            w[part], g[part], part, (scale_w, scale_g, scale_wg), channels, constants or ()
        )


def _context_piece(
    w: Tensor,
    g: Tensor,
    part: slice,
    scales: tuple[Tensor, Tensor, Tensor],
    channels: tuple[Tensor, Tensor, Tensor, Tensor],
    constants: Constants,
) -> Tensor:
    """Fill [F, n] for some output channels; w and g are [rows, in, kernel]."""
    scale_w, scale_g, scale_wg = scales
    out_w, out_g, in_w, in_g = channels
    piece = w.new_empty(VARYING + len(constants), *w.shape)
    torch.div(w.abs(), scale_w, out=piece[0])
    torch.asinh(g.abs() / scale_g, out=piece[1])
    torch.asinh((w * g) / scale_wg, out=piece[2])
    piece[3], piece[4] = out_w[part], out_g[part]
    piece[5], piece[6] = in_w, in_g
    for place, constant in enumerate(constants, start=VARYING):
        piece[place] = constant
    return piece.view(len(piece), -1)


def _precise(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, unless it is in float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt().clamp(min=TINY)


def _relative(tensor: Tensor, dims: tuple[int, int], scale: Tensor) -> Tensor:
    """Return log of a channel's rms over the layer's, within -3..3; shape broadcasts to tensor."""
    channel = tensor.square().mean(dims, keepdim=True).sqrt()
    return (channel / scale).clamp(min=TINY).log().clamp(-LIMIT, LIMIT)
