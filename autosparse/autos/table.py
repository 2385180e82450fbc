"""Files of earlier versions that hold the paper's AutoS as a table of its two inputs.

The paper's network sees a weight's value and gradient and nothing else, so it could be looked up on
a grid. The grid is even in asinh(x / scale): fine where most weights lie, coarse in the tails.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

GRID = 193
"""Points along each axis, as those files have them."""
PIECE = 1 << 16
"""Weights that are looked up in one go: what is worked out between stays in a core's cache."""


class Table(nn.Module):
    """A bilinear table over (weight, gradient), both warped by asinh(x / scale); flat outside.

    Buffers: `values` [GRID, GRID], the weight along the first axis; `scale` and `reach` (of the
    grid, after warping) [2], in the order weight, gradient.
    """

    values: Tensor
    scale: Tensor
    reach: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(GRID, GRID))
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("reach", torch.ones(2))

    @torch.no_grad()
    def forward(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Return the table's values for tensors of one shape, in that shape."""
        parts = zip(weight.flatten().split(PIECE), gradient.flatten().split(PIECE), strict=True)
        return torch.cat([self._look_up(w, g) for w, g in parts]).view(weight.shape)

    def _look_up(self, weight: Tensor, gradient: Tensor) -> Tensor:
        rows, columns = (
            torch.asinh(each.float() / scale) / reach
            for each, scale, reach in zip((weight, gradient), self.scale, self.reach, strict=True)
        )
        places = torch.stack([columns, rows], dim=-1)[None, None]  # grid_sample's order; in -1..1.
        return functional.grid_sample(
            self.values[None, None], places, padding_mode="border", align_corners=True
        )[0, 0, 0]
