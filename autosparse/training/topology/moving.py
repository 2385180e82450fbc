"""Topologies whose survivors are exchanged in training: when, and how (SET, RigL, MEST)."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autosparse.core.errors import RunFailed
from autosparse.models import zoo
from autosparse.sparsity import masks
from autosparse.sparsity.compact import (
    CompactWeight,
    DenseGradient,
    compact_weights,
    densify,
    values_of,
)
from autosparse.sparsity.paths import CannotFollow
from autosparse.sparsity.reach import within_reach
from autosparse.training.config import TrainingConfig
from autosparse.training.recipe import step_seed
from autosparse.training.topology import mest, rigl
from autosparse.training.topology import set as set_
from autosparse.training.topology.base import Topology
from autosparse.training.topology.growth import Layer, fraction_at, grow, rearranged, sources
from autosparse.training.topology.kept import Kept

logger = logging.getLogger(__name__)
AUTO, GRADIENT, RANDOM = "auto", "gradient", "random"
GROW_FROM = (AUTO, GRADIENT, RANDOM)
"""What `training.topology_grow_from` may say."""
DRAWN = 0x5E7
"""Any number: with it, growth is not drawn from the seed that the step's dropout is drawn from."""


@dataclass(frozen=True)
class Method:
    """How a method chooses what goes, and what others grow from unless told otherwise."""

    stays: Callable[..., Tensor]
    """(layer, how many go) -> bool [kept]."""
    grows_from: str
    weighs_gradients: bool = False
    """What goes depends on the gradient, too."""


METHODS = {
    "set": Method(set_.stays, RANDOM),
    "rigl": Method(rigl.stays, GRADIENT),
    "mest": Method(mest.stays, RANDOM, weighs_gradients=True),
}


@dataclass
class _MovingWeight:
    """A compact weight, under every name that it has."""

    parameter: nn.Parameter
    weights: list[CompactWeight]
    first: Tensor
    """Where its survivors were in the ticket, int32 [kept], on the CPU."""
    listener: DenseGradient = field(default_factory=DenseGradient)

    @property
    def index(self) -> Tensor:
        return self.weights[0].index.long()

    @property
    def size(self) -> int:
        return math.prod(self.weights[0].shape)


def moving_weights(model: nn.Module) -> dict[str, _MovingWeight]:
    """Return the compact weights of a model by their (first) dense name."""
    by_parameter: dict[nn.Parameter, tuple[str, _MovingWeight]] = {}
    for name, weight in compact_weights(model):
        parameter = values_of(model, name)
        if parameter in by_parameter:
            by_parameter[parameter][1].weights.append(weight)
        else:
            moving = _MovingWeight(parameter, [weight], weight.index.cpu().clone())
            by_parameter[parameter] = (name, moving)
    return dict(by_parameter.values())


class Moving(Topology):
    """Exchanges some survivors of each layer for others, every so many steps.

    Args:
        model: compact, as its ticket made it, before an engine shares its parameters out.
        config: the training's; its topology is one of METHODS.
        steps: of the whole training.
        world_size: ranks that train together.
    """

    weights: dict[str, _MovingWeight]

    def __init__(
        self, model: nn.Module, config: TrainingConfig, steps: int, world_size: int = 1
    ) -> None:
        super().__init__(model, config)
        self.world_size, self.method = world_size, METHODS[config.topology]
        self.end = config.topology_until * steps
        self.grows_from = config.topology_grow_from
        if self.grows_from == AUTO:
            self.grows_from = self.method.grows_from
        self.listens = self.grows_from == GRADIENT or self.method.weighs_gradients
        self.weights = moving_weights(model)
        self.dense_model: nn.Module | None = None
        """A copy whose paths are followed (topology_on_paths)."""
        if config.topology_on_paths:
            self.dense_model = densify(copy.deepcopy(self.model)).cpu()
        if self.weights and config.topology_every >= self.end:
            logger.warning(
                "training.topology %s never moves: the first update is at step %d of %d, and none "
                "comes after step %d", config.topology, config.topology_every, steps, self.end,
            )  # fmt: skip
        self.record()

    def due(self, updates: int) -> bool:
        step = updates + 1
        return bool(self.weights) and step % self.config.topology_every == 0 and step < self.end

    def hears(self, updates: int) -> bool:
        return self.due(updates) and self.listens

    @contextmanager
    def listening(self, updates: int) -> Iterator[None]:
        """Run a step's passes, forward and backward; add up dense gradients if they are needed.

        In such a step each layer is made dense by itself, sparse products are left out, and the
        network runs uncompiled.
        """
        if not self.hears(updates):
            yield
            return
        for each in self.weights.values():
            each.listener = DenseGradient()
            for weight in each.weights:
                weight.listener = each.listener
        eager = torch.compiler.set_stance("force_eager") if self.config.compile else nullcontext()
        try:
            with eager:
                yield
        finally:
            for each in self.weights.values():
                for weight in each.weights:
                    weight.listener = None

    @torch.no_grad()
    def exchange(
        self,
        step: int,
        seed: int,
        kept: Kept,
        image_shape: tuple[int, ...],
        average: nn.Module | None = None,
        loss_scale: float = 1.0,
    ) -> None:
        """Exchange survivors after step `step`, and note how many in the history."""
        gradients = self._gradients(loss_scale)
        finite = all(bool(each.amax().isfinite()) for each in gradients.values())
        exchanged = 0
        if finite:  # Otherwise the step was skipped, or the loss is not finite.
            layers = {
                name: Layer(each.index, kept.whole(each.parameter).clone(), each.size,
                            gradients.get(name))
                for name, each in self.weights.items()
            }  # fmt: skip
            after = self._chosen(layers, step, seed, image_shape)
            averaged = moving_weights(average) if average is not None else {}
            for name, index in after.items():
                exchanged += self._move(name, index, kept, averaged.get(name))
        self._agree(step)
        self.history.append({"step": step, "exchanged": exchanged, "overlap": self._overlap()})
        self.record()

    def _gradients(self, loss_scale: float) -> dict[str, Tensor]:
        """Return |mean dense gradient| over all ranks, [size] each; {} if none are needed."""
        if not self.listens:
            return {}
        totals, sent = {}, []
        for name, each in self.weights.items():
            total = each.listener.total
            if total is None:  # The layer took no part in this step.
                total = each.parameter.new_zeros(each.size)
            each.listener.total = None
            totals[name] = total
            if self.world_size > 1:
                sent.append(dist.all_reduce(total, async_op=True))
        for each in sent:
            each.wait()
        return {n: t.div_(self.world_size * loss_scale).abs_() for n, t in totals.items()}

    def _chosen(
        self, layers: Mapping[str, Layer], step: int, seed: int, image_shape: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """Return the new survivors of every layer."""
        share = fraction_at(step, self.config.topology_fraction, self.end)
        stays = {}
        for name, layer in layers.items():
            count = int(share * len(layer.index))
            more = (self.config.topology_gradient_weight,) if self.method.weighs_gradients else ()
            stays[name] = self.method.stays(layer, count, *more)
        reach = self._reach(layers, stays, image_shape)
        survivors = {}
        for number, (name, layer) in enumerate(layers.items()):
            if self.grows_from == GRADIENT:
                assert layer.gradient is not None
                scores = layer.gradient
            else:
                drawn = torch.Generator().manual_seed(step_seed(seed, step, number) ^ DRAWN)
                scores = torch.rand(layer.size, generator=drawn).to(layer.index.device)
            survivors[name] = grow(layer, stays[name], scores, reach.get(name))
        return survivors

    def _reach(
        self,
        layers: Mapping[str, Layer],
        stays: Mapping[str, Tensor],
        image_shape: tuple[int, ...],
    ) -> dict[str, Tensor]:
        """Return where a weight would lie on a path of those that stay; {} if that is not asked."""
        if self.dense_model is None:
            return {}
        kept = masks.dense(zoo.prunable(self.dense_model))
        for name, layer in layers.items():
            mask = torch.zeros(layer.size, dtype=torch.bool)
            mask[layer.index[stays[name]].cpu()] = True
            kept[name] = mask.view(self.weights[name].weights[0].shape)
        try:
            with torch.enable_grad():
                on_path = within_reach(self.dense_model, kept, image_shape)
        except CannotFollow as error:
            logger.warning(
                "the paths of %s cannot be followed (%s); training.topology_on_paths is left out",
                type(self.dense_model).__name__, error,
            )  # fmt: skip
            self.dense_model = None
            return {}
        return {n: on_path[n].view(-1).to(layer.index.device) for n, layer in layers.items()}

    def _move(self, name: str, after: Tensor, kept: Kept, averaged: _MovingWeight | None) -> int:
        """Let other weights of a layer survive; return how many are new."""
        each = self.weights[name]
        source = sources(each.index, after)
        new = int((source < 0).count_nonzero())
        if new:
            kept.change(each.parameter, lambda values: rearranged(values, source))
            if averaged is not None:
                mine = averaged.parameter.detach()
                mine.copy_(rearranged(mine, source))
            for weight in (*each.weights, *(averaged.weights if averaged else ())):
                weight.exchange(after)
        return new

    def _agree(self, step: int) -> None:
        """Raise RunFailed unless all ranks have the same masks now."""
        if self.world_size == 1 or not self.weights:
            return
        mine = torch.cat([each.weights[0].fingerprint for each in self.weights.values()])
        marks = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(marks, mine)
        if any(not torch.equal(mine, other) for other in marks):
            raise RunFailed(
                f"the ranks chose different masks after step {step}; are they of one kind, with "
                "the same libraries? Go on from the last checkpoint on such"
            ).on_all_ranks()

    def _overlap(self) -> float:
        """Return the share of the ticket's own survivors, among compact weights, that survive."""
        same = total = 0
        for each in self.weights.values():
            now = each.weights[0].mask().view(-1)
            same += int(now[each.first.long().to(now.device)].count_nonzero())
            total += len(each.first)
        return same / max(total, 1)

    def card_entry(self) -> dict[str, Any]:
        return {
            "method": self.config.topology,
            "every": self.config.topology_every,
            "fraction": self.config.topology_fraction,
            "until": self.config.topology_until,
            "grow_from": self.grows_from,
            "dense_gradients": self.listens,
            "on_paths": self.dense_model is not None,
            "updates": self.history,
        }

    def indices(self) -> dict[str, Tensor]:
        """Return where the survivors of every layer are, int32."""
        return {name: each.weights[0].index.cpu() for name, each in self.weights.items()}

    def restore(
        self,
        indices: Mapping[str, Tensor],
        history: list[dict[str, Any]],
        average: nn.Module | None = None,
    ) -> None:
        averaged = moving_weights(average) if average is not None else {}
        for name, index in indices.items():
            for moving in (self.weights[name], averaged.get(name)):
                for weight in moving.weights if moving else ():
                    weight.exchange(index.to(weight.index.device))
        super().restore(indices, history, average)
