"""SynFlow: iterative pruning by synaptic flow, without data.

Paper: H. Tanaka et al., Pruning neural networks without any data by iteratively conserving
synaptic flow (NeurIPS 2020), arXiv 2006.05467, equation 4 and algorithm 1: with all parameters
replaced by their absolute values and an input of ones, R = sum of the outputs and
score = |θ * dR/dθ|; over n rounds the density falls as final^(k/n) (n = 100).

As in the paper's code batch norm is in eval mode. Departures: biases and shifts are left out, as
in the paper's equation (its code adds their absolute values); kernels are not standardised
(NFNet); layers that are no linear maps (softmax, layer norm, GELU) stay as they are, since the
paper covers piecewise linear networks only. Weights pruned in an earlier round rank below all
others.

Deep networks overflow in float32. Where the copy turns out to be linear from block to block, the
signal is divided by a power of two after every block: all paths run through those points, so
every score is scaled alike. Elsewhere everything is computed in float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.criteria import Scores, register
from autosparse.errors import UsageError
from autosparse.gradients import spend
from autosparse.rounds import shrink
from autosparse.standardised import as_plain


@register("synflow", needs_data=False)
def synflow(model, parameters, batches, loss_fn, *, sparsity: float, rounds: int = 100) -> Scores:
    """Return the synaptic flow after the last round; weights that fell in round k score k - n - 1.

    Args:
        sparsity: fraction of weights to remove in the end.
        rounds: n, over which the density falls exponentially.
    """
    linear = linearised(model, parameters)
    weights: dict[str, Tensor] = {name: linear.get_parameter(name) for name in parameters}
    ones = ones_for(model, batches, next(iter(weights.values())))
    if not rescale_between_blocks(linear, ones):
        linear, ones = linear.double(), ones.double()

    def gradient() -> tuple[Tensor | None, ...]:
        spend(len(ones))
        return torch.autograd.grad(linear(ones).sum(), list(weights.values()), allow_unused=True)

    return shrink(weights, gradient, sparsity, rounds, min_per_layer=0)


def linearised(model: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    """Return a copy with absolute weights and no shifts, in eval mode."""
    linear = as_plain(copy.deepcopy(model)).eval()
    with torch.no_grad():
        for name, tensor in linear.state_dict().items():
            if name.rpartition(".")[2] in ("bias", "running_mean"):
                tensor.zero_()
            elif tensor.is_floating_point():
                tensor.abs_()
    for parameter in linear.parameters():
        parameter.requires_grad_(False)
    for name in parameters:
        linear.get_parameter(name).requires_grad_(True)
    return linear.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def ones_for(model: nn.Module, batches: Any, like: Tensor) -> Tensor:
    """Return one image of ones: of the batches' shape, or of what the model was built for."""
    recipe: Any = getattr(model, "autosparse_recipe", None)
    registered: Any = getattr(model, "pretrained_cfg", None)
    first = next(iter(batches), None)
    if first is not None:
        shape = tuple(first[0].shape[1:])
    elif recipe is not None:
        shape = (recipe["in_chans"], recipe["image_size"], recipe["image_size"])
    elif registered is not None:
        shape = tuple(registered["input_size"])
    else:
        raise UsageError("synflow needs to know the images' shape: give it a batch")
    return torch.ones((1, *shape), dtype=like.dtype, device=like.device)


def rescale_between_blocks(linear: nn.Module, ones: Tensor) -> bool:
    """Divide the signal by a power of two after every block, if that scales all flow alike.

    Tested, not assumed: the outputs of n blocks are doubled, and the network's output must be
    2^n times as large, to the last bit, which it is if it is linear and every path runs through
    every one of them. Returns whether it is so.
    """
    blocks = list(_blocks(linear))
    if not blocks:
        return False
    linear.double()
    with torch.no_grad():
        before = linear(ones.double())
        with _hooked(blocks, lambda module, inputs, output: output * 2):
            after = linear(ones.double())
    linear.float()
    if not torch.isfinite(after).all() or not torch.equal(after, before * 2.0 ** len(blocks)):
        return False
    for block in blocks:
        block.register_forward_hook(_divided)
    for module in list(linear.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):  # of what is never negative here
                setattr(module, name, nn.Identity())
    return True


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the outermost sequences."""
    for child in module.children():
        if isinstance(child, nn.Sequential):
            for member in child:
                yield from _blocks(nn.Sequential(member)) if _is_sequence(member) else (member,)
        else:
            yield from _blocks(child)


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential)


@contextmanager
def _hooked(blocks: list[nn.Module], hook: Any) -> Iterator[None]:
    handles = [block.register_forward_hook(hook) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _divided(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    peak = float(output.detach().amax())
    return output / 2.0 ** math.floor(math.log2(peak)) if peak > 0 else output
