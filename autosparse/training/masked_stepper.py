"""Training of pruned networks one after the other, with dense weights and masks.

A GPU that trains one small network gains little from compact parameters, and loses much where the
network is compiled anew for every mask. So here weights stay dense, and gradients and weights are
multiplied by masks at every step. Network and masks stay where they are, so that whatever was
compiled for the first training serves all that follow.

Survivors are trained as compact ones are, except for rounding: a pruned weight is zero, has no
momentum, does not decay, and does not count when gradients are clipped.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autosparse.core.errors import UsageError
from autosparse.models.standardised import unmask
from autosparse.sparsity.ticket import Ticket, load_state
from autosparse.training.config import TrainingConfig
from autosparse.training.masked_weights import MaskedWeights
from autosparse.training.optimizers import ELEMENTWISE, optimizer_and_schedule
from autosparse.training.recipe import make_ema
from autosparse.training.steppers import PlainStepper
from autosparse.training.topology.base import STATIC


def can_train(config: TrainingConfig) -> bool:
    """Return whether masked weights are trained just as compact ones would be."""
    elementwise = config.optimizer in ELEMENTWISE and not config.optimizer_options.get("caution")
    return elementwise and config.topology == STATIC and config.optimizer_wrapper != "sparseopt"


class MaskedStepper(PlainStepper):
    """One process, plain PyTorch, dense weights under masks; see `begin`.

    Args:
        model: dense, on its device; its weights are those of the training under way.
        config: of all trainings. Raises UsageError for an optimizer that does not treat every
            weight by itself (see ELEMENTWISE).
        steps_per_epoch: of all trainings.
        names: the parameters that may be pruned.
    """

    compile_mode = "reduce-overhead"
    """Compiled passes are launched as a whole (CUDA graphs): weights stay where they are."""

    def __init__(
        self, model: nn.Module, config: TrainingConfig, steps_per_epoch: int, names: list[str]
    ) -> None:
        if config.topology != STATIC:
            raise UsageError(
                f"training.topology {config.topology} exchanges compact weights; these are masked"
            )
        if not can_train(config):
            raise UsageError(
                f"optimizer {config.optimizer} does not treat every weight by itself, so that "
                "masked weights are not trained as compact ones are"
            )
        unmask(model)
        super().__init__(model, config, steps_per_epoch)
        self.steps_per_epoch = steps_per_epoch
        self.masked = self.topology.masked = MaskedWeights(model, names)

    @torch.no_grad()
    def begin(self, ticket: Ticket) -> MaskedStepper:
        """Start a training anew from a ticket of this model; return the stepper itself."""
        load_state(self.model, ticket)
        for name, mask in self.masked.masks.items():
            mask.copy_(ticket.masks[name])
        for parameter in self.model.parameters():
            parameter.grad = None
        self.optimizer, self.scheduler = optimizer_and_schedule(
            self.model, self.config, self.steps_per_epoch
        )
        self.ema = make_ema(self.model, self.config)
        self.updates = 0
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state dict; of a pruned weight it holds the surviving values only, 1-D."""
        state = dict(super().state_dict())
        for name, mask in self.masked.masks.items():
            kept = mask.bool()
            if not bool(kept.all()):
                state[name] = state[name][kept]
        return state
