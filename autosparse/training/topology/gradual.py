"""From the dense model to a sparse one in training: the reference methods GMP and AC/DC.

They train dense weights under masks, so they cost the time and memory of dense training, and the
masks besides; the ticket's card says how much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autosparse.core.errors import UsageError
from autosparse.models import zoo
from autosparse.sparsity import masks
from autosparse.sparsity.compact import compact_weights
from autosparse.sparsity.ticket import MASKS
from autosparse.training.config import TrainingConfig
from autosparse.training.masked_weights import MaskedWeights
from autosparse.training.topology import ac_dc, gmp
from autosparse.training.topology.base import Topology
from autosparse.training.topology.kept import Kept

SCHEDULES: dict[str, Callable[[int, int, int, float], float]] = {
    "gmp": gmp.sparsity,
    "ac_dc": ac_dc.sparsity,
}
"""(step, every, end, final sparsity) -> sparsity after that step."""


class Gradual(Topology):
    """Decides, for a dense model in training, which of its weights are zero.

    Args:
        model: dense.
        config: the training's: topology, topology_every, topology_until, topology_sparsity count.
        steps: of the whole training.
    """

    masked: MaskedWeights

    def __init__(self, model: nn.Module, config: TrainingConfig, steps: int) -> None:
        super().__init__(model, config)
        made_compact = next(compact_weights(model), None)
        if made_compact is not None:
            raise UsageError(
                f"training.topology {config.topology} begins with the dense model, and "
                f"{made_compact[0]} is pruned; leave out tickets and prune, and name the model"
            )
        self.schedule = SCHEDULES[config.topology]
        self.end = max(1, round(config.topology_until * steps))
        exclude = getattr(self.model, "autosparse_recipe", {}).get("exclude", ())
        self.masked = MaskedWeights(self.model, zoo.prunable(self.model, exclude))
        self.weights, self.masks = self.masked.weights, self.masked.masks
        self.image_passes = config.batch_size * steps
        self.record()

    def due(self, updates: int) -> bool:
        return self._sparsity(updates + 1) != self._sparsity(updates)

    def _sparsity(self, step: int) -> float:
        final = self.config.topology_sparsity
        return self.schedule(step, self.config.topology_every, self.end, final)

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
        """Choose the masks anew by magnitude, after step `step`."""
        sparsity = self._sparsity(step)
        scores = {name: weight.detach().abs() for name, weight in self.weights.items()}
        if not all(masks.is_finite(score) for score in scores.values()):
            return  # Nor is the loss, and the training ends with that error.
        before = {name: mask.bool() for name, mask in self.masks.items()}
        within = before if self.schedule is gmp.sparsity else None
        chosen = masks.from_scores(scores, sparsity, within=within)
        for name, mask in chosen.items():
            self.masks[name].copy_(mask)
            kept.change(self.weights[name], self.masks[name].mul)
            if average is not None:
                average.get_parameter(name).detach().mul_(self.masks[name])
        if average is not None:
            self.masked.mask_kernels_of(average)
        self.history.append({"step": step, "sparsity": masks.sparsity(chosen)})
        self.record()

    def record(self) -> None:
        super().record()
        setattr(self.model, MASKS, self.masks)

    def card_entry(self) -> dict[str, Any]:
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        held = sum(mask.numel() * mask.element_size() for mask in self.masks.values())
        return {
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

    def indices(self) -> dict[str, Tensor]:
        """Return the masks, packed."""
        return {name: masks.pack(mask.bool()) for name, mask in self.masks.items()}

    def restore(
        self,
        indices: Mapping[str, Tensor],
        history: list[dict[str, Any]],
        average: nn.Module | None = None,
    ) -> None:
        for name, packed in indices.items():
            self.masks[name].copy_(masks.unpack(packed, self.masks[name].shape))
        if average is not None:
            self.masked.mask_kernels_of(average)
        super().restore(indices, history, average)
