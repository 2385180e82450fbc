"""What every topology of a training answers; by itself, one that stays as the ticket says."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from autosparse.models.zoo import unwrapped
from autosparse.sparsity.ticket import TOPOLOGY
from autosparse.training.config import TrainingConfig
from autosparse.training.masked_weights import MaskedWeights
from autosparse.training.topology.kept import Kept

STATIC = "static"


class Topology:
    """Decides which weights of a model in training survive; here it never changes them.

    Args:
        model: on its device, before an engine shares its parameters out.
        config: the training's.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig) -> None:
        self.model, self.config = unwrapped(model), config
        self.model.__dict__.pop(TOPOLOGY, None)  # Of a training before this one.
        self.weights: Mapping[str, Any] = {}
        """What may change, by the name of the dense parameter."""
        self.history: list[dict[str, Any]] = []
        """An entry for every change."""
        self.masked: MaskedWeights | None = None
        """Weights that are trained dense, under masks."""

    def due(self, updates: int) -> bool:
        """Return whether the step after `updates` steps ends with a change."""
        return False

    def hears(self, updates: int) -> bool:
        """Return whether that step needs the gradients of dense weights."""
        return False

    def listening(self, updates: int) -> AbstractContextManager:
        """Return a context for that step's passes, in which needed gradients are added up."""
        return nullcontext()

    def after_backward(self) -> None:
        """Take the gradients from what is masked, before they are clipped."""
        if self.masked:
            self.masked.mask_gradients()

    def after_update(self) -> None:
        """Set what is masked to zero again, once the optimizer has changed the parameters."""
        if self.masked:
            self.masked.mask_values()

    def exchange(
        self,
        step: int,
        seed: int,
        kept: Kept,
        image_shape: tuple[int, ...],
        average: nn.Module | None = None,
        loss_scale: float = 1.0,
    ) -> None:
        """Change what survives; called by all ranks, with the same values.

        Args:
            step: number of steps made.
            seed: of what is drawn.
            kept: where values and moments are.
            image_shape: [C, H, W].
            average: a model of averaged values (EMA), which follows.
            loss_scale: what the loss was multiplied by.
        """

    def indices(self) -> dict[str, Tensor]:
        """Return which weights survive, on the CPU, for a checkpoint; {} if nothing changes."""
        return {}

    def restore(
        self,
        indices: Mapping[str, Tensor],
        history: list[dict[str, Any]],
        average: nn.Module | None = None,
    ) -> None:
        """Go back to `indices` and `history`, before the values that belong to them are loaded."""
        self.history = list(history)
        self.record()

    def record(self) -> None:
        """Leave on the model what the card of its trained ticket tells of the changes."""
        if self.weights:
            setattr(self.model, TOPOLOGY, self.card_entry())

    def card_entry(self) -> dict[str, Any]:
        """Return that entry of the card: the settings, and the history as `updates`."""
        return {}
