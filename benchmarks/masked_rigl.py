"""The peer of topologies that move: RigL as public code has it, masks over dense weights."""

from __future__ import annotations

import math
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune


class MaskedRigL:
    """A plain DeepSpeed loop over dense weights under masks, exchanged every so many steps.

    Between updates it is masked-dense training (torch.nn.utils.prune). At one, gradients of the
    masked weights are kept dense, all-reduced, and weights exchanged; what belongs to it in the
    optimizer's moments is left out, in the peer's favour.

    Args:
        model: dense.
        masks: by parameter name, True = kept.
        config: DeepSpeed's.
        every: steps between updates.
        fraction: share of the survivors that each exchanges.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: dict[str, Tensor],
        config: dict[str, Any],
        every: int,
        fraction: float,
    ) -> None:
        self.holders: list[tuple[Any, str]] = []
        for name, mask in masks.items():
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            torch_prune.custom_from_mask(module, attribute, mask)
            self.holders.append((module, attribute))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.engine.train()
        self.every, self.fraction, self.made = every, fraction, 0
        self.loss = nn.CrossEntropyLoss()

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        self.made += 1
        updates = self.made % self.every == 0
        outputs = self.engine(images)
        weights = [getattr(*holder) for holder in self.holders]  # Made by the forward pass.
        for weight in weights if updates else ():
            weight.retain_grad()
        loss = self.loss(outputs, labels)
        self.engine.backward(loss)
        self.engine.step()
        if updates:
            for (module, attribute), weight in zip(self.holders, weights, strict=True):
                dist.all_reduce(weight.grad)
                self.exchange(module, attribute, weight.grad)
        return loss.detach()

    @torch.no_grad()
    def exchange(self, module: Any, attribute: str, gradient: Tensor) -> None:
        """Let the smallest survivors go, and as many come where the gradient is largest."""
        mask = getattr(module, f"{attribute}_mask").view(-1)
        weight = getattr(module, f"{attribute}_orig").view(-1)
        before = mask.clone()
        count = math.floor(self.fraction * int(mask.sum()))
        size = weight.abs().masked_fill(mask == 0, math.inf)
        mask[size.topk(count, largest=False).indices] = 0
        mask[gradient.view(-1).abs().masked_fill(mask == 1, -1).topk(count).indices] = 1
        weight[before < mask] = 0
