"""From the dense model to a sparse one in training: references, with dense weights under masks.

They cost what dense training costs, in time and in memory, and the masks besides: the card says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.core.errors import UsageError
from autosparse.models import zoo
from autosparse.models.standardised import keep_mask, mask_kernel
from autosparse.models.zoo import owner, unwrapped
from autosparse.sparsity import masks
from autosparse.sparsity.compact import compact_weights
from autosparse.sparsity.ticket import MASKS, TOPOLOGY
from autosparse.training.config import TrainingConfig
from autosparse.training.topology import ac_dc, gmp
from autosparse.training.topology.kept import Kept

SCHEDULES: dict[str, Callable[[int, int, int, float], float]] = {
    "gmp": gmp.sparsity,
    "ac_dc": ac_dc.sparsity,
}
"""(step, every, end, final sparsity) -> sparsity after that step."""


class Gradual:
    """Decides, for a dense model in training, which of its weights are zero; see moving.Topology.

    Args:
        model: dense.
        config: the training's: topology, topology_every, topology_until, topology_sparsity count.
        steps: of the whole training.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig, steps: int) -> None:
        self.model, self.config = unwrapped(model), config
        made_compact = next(compact_weights(model), None)
        if made_compact is not None:
            raise UsageError(
                f"training.topology {config.topology} begins with the dense model, and "
                f"{made_compact[0]} is pruned; leave out tickets and prune, and name the model"
            )
        self.schedule = SCHEDULES[config.topology]
        self.end = max(1, round(config.topology_until * steps))
        exclude = getattr(self.model, "autosparse_recipe", {}).get("exclude", ())
        self.weights = dict(zoo.prunable(self.model, exclude))
        self.masks = {n: torch.ones_like(w).detach() for n, w in self.weights.items()}
        for name, mask in self.masks.items():
            _apply(self.model, name, mask)
        self.history: list[dict[str, Any]] = []
        self.image_passes = config.batch_size * steps
        self._remember()

    def due(self, updates: int) -> bool:
        """Return whether the masks change after the step that follows so many steps."""
        return self._sparsity(updates + 1) != self._sparsity(updates)

    def _sparsity(self, step: int) -> float:
        final = self.config.topology_sparsity
        return self.schedule(step, self.config.topology_every, self.end, final)

    def hears(self, updates: int) -> bool:
        """Return False: gradients are dense as it is."""
        return False

    @contextmanager
    def listening(self, updates: int) -> Iterator[None]:
        """Do nothing."""
        yield

    @torch.no_grad()
    def after_backward(self) -> None:
        """Take the gradients from what is pruned."""
        pairs = [(w.grad, self.masks[n]) for n, w in self.weights.items() if w.grad is not None]
        if pairs:
            torch._foreach_mul_(*(list(each) for each in zip(*pairs, strict=True)))

    @torch.no_grad()
    def after_update(self) -> None:
        """Set what is pruned to zero again."""
        torch._foreach_mul_(list(self.weights.values()), list(self.masks.values()))

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
        """Choose the masks anew after step `step`; args are those of moving.Topology."""
        sparsity = self._sparsity(step)
        scores = {name: weight.detach().abs() for name, weight in self.weights.items()}
        if not all(masks.is_finite(score) for score in scores.values()):
            return  # The loss is no number either, and the training ends with that.
        before = {name: mask.bool() for name, mask in self.masks.items()}
        within = before if self.schedule is gmp.sparsity else None
        chosen = masks.from_scores(scores, sparsity, within=within)
        for name, mask in chosen.items():
            self.masks[name].copy_(mask)
            kept.change(self.weights[name], self.masks[name].mul)
            if average is not None:
                average.get_parameter(name).detach().mul_(self.masks[name])
                _apply(average, name, self.masks[name])
        self.history.append({"step": step, "sparsity": masks.sparsity(chosen)})
        self._remember()

    def _remember(self) -> None:
        """Leave on the model the masks, and what the card of its trained ticket tells."""
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        held = sum(mask.numel() * mask.element_size() for mask in self.masks.values())
        told = {
            "method": self.config.topology,
            "every": self.config.topology_every,
            "until": self.config.topology_until,
            "sparsity": self.config.topology_sparsity,
            "updates": self.history,
            "cost": {
                "dense_parameter_bytes": size,
                "mask_bytes": held,
                "dense_image_passes": self.image_passes,
            },
        }
        setattr(self.model, TOPOLOGY, told)
        setattr(self.model, MASKS, self.masks)

    def indices(self) -> dict[str, Tensor]:
        """Return the masks, packed: for a checkpoint."""
        return {name: masks.pack(mask.bool()) for name, mask in self.masks.items()}

    def restore(
        self,
        indices: Mapping[str, Tensor],
        history: list[dict[str, Any]],
        average: nn.Module | None = None,
    ) -> None:
        """Go back to masks and history."""
        for name, packed in indices.items():
            self.masks[name].copy_(masks.unpack(packed, self.masks[name].shape))
            if average is not None:
                _apply(average, name, self.masks[name])
        self.history = list(history)
        self._remember()


def _apply(model: nn.Module, name: str, mask: Tensor) -> None:
    """Let a mask act on the kernel of a convolution that standardises its weight."""
    module, _ = owner(model, name)
    mask_kernel(module)
    keep_mask(module, mask)
