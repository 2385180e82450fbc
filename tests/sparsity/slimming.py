"""What the tests of slimming share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def images_of(side: int, channels: int = 3) -> Tensor:
    """Return three random images."""
    return torch.randn(3, channels, side, side, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def spoilt(model: nn.Module, density: float, dead: int = 0) -> nn.Module:
    """Prune at random; biases and norms get values that are not those of an initialization.

    `dead`: every so many weights are zero as a whole.
    """
    generator = torch.Generator().manual_seed(0)
    for number, parameter in enumerate(each for each in model.parameters() if each.dim() > 1):
        if dead and number % dead == dead - 1:
            parameter.zero_()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(torch.rand(parameter.shape, generator=generator) < density)
        else:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.3, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=generator)
    return model.eval()


@torch.no_grad()
def same_logits(small: nn.Module, model: nn.Module, images: Tensor) -> None:
    """Within 1e-5 of the largest logit, or of one."""
    expected = model.eval()(images)
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(small(images), expected, rtol=0, atol=1e-5 * scale)
