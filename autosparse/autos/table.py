"""A function of two numbers as a table: the paper's AutoS, whatever its backbone, made fast.

The paper's network sees a weight's value and gradient and nothing else, so what it says can be
looked up. The grid is even in asinh(x / scale): fine where most weights lie, coarse in the tails.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

GRID = 193
"""Points along each axis."""
REACH = 4.0
"""The grid goes so many times as far as the largest value that was seen; beyond it is flat."""
PIECE = 1 << 16
TINY = 1e-12


class Table(nn.Module):
    """A bilinear table over (weight, gradient), both warped by asinh(x / scale).

    Buffers: `values` [GRID, GRID], the weight along the first axis; `scale` and `reach` [2], in
    the order weight, gradient.
    """

    values: Tensor
    scale: Tensor
    reach: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(GRID, GRID))
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("reach", torch.ones(2))

    @classmethod
    @torch.no_grad()
    def distilled(cls, network: Callable[[Tensor], Tensor], inputs: Tensor) -> Table:
        """Tabulate `network` ([N, 2] -> [N]) over the range of `inputs` [N, 2]."""
        table = cls()
        sizes = inputs.abs()
        table.scale.copy_(sizes.median(0).values.clamp(min=TINY))
        table.reach.copy_(torch.asinh(REACH * sizes.amax(0) / table.scale).clamp(min=1.0))
        axis = torch.linspace(-1, 1, GRID)
        ticks = torch.sinh(axis[:, None] * table.reach) * table.scale
        points = torch.cartesian_prod(ticks[:, 0], ticks[:, 1])
        found = [network(part) for part in points.split(1 << 12)]
        table.values.copy_(torch.cat(found).view(GRID, GRID))
        return table

    @torch.no_grad()
    def forward(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Return the table's values for tensors of one shape, in that shape."""
        parts = zip(weight.flatten().split(PIECE), gradient.flatten().split(PIECE), strict=True)
        return torch.cat([self._looked_up(w, g) for w, g in parts]).view(weight.shape)

    def _looked_up(self, weight: Tensor, gradient: Tensor) -> Tensor:
        # grid_sample wants (column, row), in -1..1.
        places = torch.stack(
            [
                torch.asinh(each.float() / scale) / reach
                for each, scale, reach in (
                    (gradient, self.scale[1], self.reach[1]),
                    (weight, self.scale[0], self.reach[0]),
                )
            ],
            dim=-1,
        )
        return functional.grid_sample(
            self.values[None, None], places[None, None], padding_mode="border", align_corners=True
        )[0, 0, 0]

    @torch.no_grad()
    def errors(self, network: Callable[[Tensor], Tensor], inputs: Tensor) -> dict[str, float]:
        """Return how far the table is from the network on `inputs` [N, 2]."""
        exact = torch.cat([network(part) for part in inputs.split(1 << 12)])
        error = (self(inputs[:, 0], inputs[:, 1]) - exact).abs()
        return {
            "max_error": float(error.max()),
            "mean_error": float(error.mean()),
            "spread_of_scores": float(exact.std()),
            "points": len(inputs),
        }
