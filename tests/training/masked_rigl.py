"""Masked-dense RigL in plain lines: the reference for topologies that move."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from autosparse.training.config import TrainingConfig


def masked_rigl(
    model: nn.Module,
    masks: dict[str, Tensor],
    batches: Iterable[list[tuple[Tensor, Tensor]]],
    config: TrainingConfig,
    steps: int,
) -> tuple[list[list[float]], list[dict[str, Tensor]]]:
    """Train dense weights under masks with AdamW; return every part's losses, the masks by update.

    Args:
        model: dense; trained in place.
        masks: float, by parameter name; changed in place.
        batches: of every step the parts that are averaged: one for each rank and micro-batch.
        config: its rates, decay, clipping and topology count; the rate is constant.
        steps: of the whole training.
    """
    weights = dict(model.named_parameters())
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    plain = [p for n, p in weights.items() if p.ndim < 2 or n in exempt]
    decaying = [p for n, p in weights.items() if p.ndim > 1 and n not in exempt]
    optimizer = torch.optim.AdamW(
        [{"params": decaying}, {"params": plain, "weight_decay": 0.0}],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        **config.optimizer_options,
    )
    losses, seen, end = [], [], config.topology_until * steps
    for name, mask in masks.items():
        weights[name].data *= mask
    for step, parts in enumerate(batches, start=1):
        each = [nn.functional.cross_entropy(model(images), labels) for images, labels in parts]
        torch.stack(each).mean().backward()
        dense = {name: weights[name].grad.clone() for name in masks}
        for name, mask in masks.items():
            weights[name].grad *= mask
        nn.utils.clip_grad_norm_(weights.values(), config.clip_grad or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        for name, mask in masks.items():
            weights[name].data *= mask
        losses.append([float(loss.detach()) for loss in each])
        if step % config.topology_every or step >= end:
            continue
        share = config.topology_fraction / 2 * (1 + math.cos(math.pi * step / end))
        for name, mask in masks.items():
            flat, kept = mask.view(-1), mask.view(-1).nonzero().view(-1)
            count = int(share * len(kept))
            size = weights[name].data.view(-1)[kept].abs()
            order = size.argsort(descending=True, stable=True)  # Of equal ones the last go.
            before = flat.clone()
            flat[kept[order[len(kept) - count :]]] = 0
            scores = torch.where(flat == 1, -1, dense[name].view(-1).abs())
            flat[scores.argsort(descending=True, stable=True)[:count]] = 1
            for state in (weights[name].data, *optimizer.state[weights[name]].values()):
                if state.ndim:  # What went is forgotten, what came starts at zero.
                    state.view(-1).mul_(before * flat)
        seen.append({name: mask.bool() for name, mask in masks.items()})
    return losses, seen
