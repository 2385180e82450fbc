"""How one step of a training is made, and how its state is kept.

`PlainStepper` is plain PyTorch in one process; integrations/deepspeed.py has the one for DeepSpeed.
The loop around them is in loop.py.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autosparse.core.errors import RunFailed, UsageError, UserError
from autosparse.core.files import set_aside, write_bytes
from autosparse.models.contract import in_single, outputs_of
from autosparse.models.zoo import device_of
from autosparse.sparsity.compact import lay_out, multiply_sparse, rescattering
from autosparse.training.checks import check_plain
from autosparse.training.config import TrainingConfig
from autosparse.training.flat_scatter import scatterer
from autosparse.training.optimizers import advance, last_rate, optimizer_and_schedule
from autosparse.training.recipe import Recipe, autocast, make_ema, seed_step, step_seed
from autosparse.training.topology.chosen import topology_of
from autosparse.training.topology.kept import KeptHere

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Ranks:
    """This process's rank among those that train together."""

    rank: int = 0
    world_size: int = 1

    def first_says(self, ask: Callable[[], Answer]) -> Answer:
        """Return rank 0's answer on every rank; an error of rank 0 is raised on all.

        For questions about files, which other nodes may see late or never. Called by all ranks.
        """
        if self.world_size == 1:
            return ask()
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = ask()
            except Exception as error:
                answer[1] = self._told(error)
                dist.broadcast_object_list(answer, src=0)
                raise
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def together(self, make: Callable[[], Answer]) -> Answer:
        """Return what `make` gives on this rank; an error of one rank is raised on all.

        For what each rank does by itself, before they wait for each other. Called by all ranks.
        """
        if self.world_size == 1:
            return make()
        told: list[Any] = [None] * self.world_size
        try:
            made = make()
        except Exception as error:
            dist.all_gather_object(told, self._told(error))
            raise
        dist.all_gather_object(told, None)
        for error in told:
            if error is not None:
                raise error
        return made

    def _told(self, error: Exception) -> UserError:
        """Return what the other ranks raise."""
        if isinstance(error, UserError):
            return error.on_all_ranks()
        return RunFailed(f"rank {self.rank} failed: {type(error).__name__}: {error}")


@dataclass
class Epoch:
    """Results of one epoch of training."""

    epoch: int
    train_loss: float
    validation_loss: float
    validation_accuracy: float
    """0 to 1."""
    learning_rate: float
    seconds: float
    images_per_second: float = 0.0
    """Of training, over all ranks."""
    data_wait_share: float = 0.0
    """Share of the training time that this rank waited for images, 0 to 1."""
    skipped_steps: int = 0
    """Steps since the start that were skipped because gradients had overflowed."""


@dataclass
class History:
    """The epochs so far, and the part of the present epoch that is done."""

    epochs: list[Epoch] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Of the steps made so far in the present epoch (on rank 0)."""
    seconds_before: float = 0.0
    """Time spent on the present epoch before it was interrupted."""

    def plain(self) -> list[dict[str, float]]:
        return [vars(epoch) for epoch in self.epochs]

    def state(self) -> dict[str, Any]:
        """Return the history as plain data, for a checkpoint."""
        return {**vars(self), "epochs": self.plain()}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> History:
        """Undo `state`."""
        return cls(**{**state, "epochs": [Epoch(**epoch) for epoch in state["epochs"]]})


class Stepper(Protocol):
    """What makes the steps of a training, and saves and restores their state."""

    ranks: Ranks
    scheduler: Any
    updates: int
    """Steps made so far."""
    seed: int
    """Seed of what a step draws: dropout and mixing."""
    settings: dict[str, Any]
    """Settings that were passed to the library underneath (DeepSpeed), for the record."""

    @property
    def model(self) -> nn.Module:
        """The model that is trained: images -> outputs."""
        ...

    def evaluated(self) -> nn.Module:
        """Return what evaluation calls, the same on every rank: the model, or its average."""
        ...

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Make one optimizer step on this rank's images; return the loss, detached."""
        ...

    def learning_rate(self) -> float:
        """Return the rate of the last step."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return the whole state dict of the trained module, on every rank."""
        ...

    def save(self, folder: Path, history: History) -> None:
        """Write all that is needed to go on from here."""
        ...

    def load(self, folder: Path) -> History | None:
        """Go back to the last save in `folder`; None if there is none."""
        ...


class PlainStepper:
    """One process, plain PyTorch."""

    compile_mode: str | None = None
    """Of torch.compile."""

    def __init__(self, model: nn.Module, config: TrainingConfig, steps_per_epoch: int) -> None:
        check_plain(config)
        self.model, self.config, self.ranks, self.seed = model, config, Ranks(), 0
        set_up(model, config)
        self.optimizer, self.scheduler = optimizer_and_schedule(model, config, steps_per_epoch)
        self.recipe, self.ema = Recipe(config, model), make_ema(model, config)
        self.topology = topology_of(model, config, config.epochs * steps_per_epoch)
        self.updates, self.settings = 0, {}
        self.network = torch.compile(model, mode=self.compile_mode) if config.compile else model
        self.scattered = scatterer(model, config, device_of(model))

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        drawn = step_seed(self.seed, self.updates)
        seed_step(drawn, images.device)
        images, targets = self.recipe.mix(images, labels, drawn)
        with self.topology.listening(self.updates):
            with (
                autocast(self.config, images.device),
                rescattering(self.config.rescatter),
                nullcontext() if self.topology.hears(self.updates) else self.scattered(),
            ):
                outputs = in_single(outputs_of(self.network, images))
            loss = self.recipe.loss(outputs, images, targets)
            loss.backward()
        self.topology.after_backward()
        if self.config.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.optimizer.step()
        self.topology.after_update()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        advance(self.scheduler, self.updates)
        if self.ema is not None:
            self.ema.update(self.model, self.updates)
        if self.topology.due(self.updates - 1):
            self.exchange(images)
        return loss.detach()

    def exchange(self, images: Tensor) -> None:
        """Change which weights survive, as `training.topology` says."""
        average = None if self.ema is None else self.ema.module
        kept, shape = KeptHere(self.optimizer), tuple(images.shape[1:])
        self.topology.exchange(self.updates, self.seed, kept, shape, average)
        self.scattered = nullcontext  # Frees its memory before the new one is made.
        self.scattered = scatterer(self.model, self.config, device_of(self.model))

    def evaluated(self) -> nn.Module:
        return self.model if self.ema is None else self.ema.module

    def learning_rate(self) -> float:
        return last_rate(self.optimizer, self.scheduler, self.updates)

    def state_dict(self) -> dict[str, Tensor]:
        return self.evaluated().state_dict()

    def save(self, folder: Path, history: History) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
            "history": history.state(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "topology": (self.topology.indices(), self.topology.history),
        }
        whole = io.BytesIO()
        torch.save(state, whole)
        write_bytes(folder / "checkpoint.pt", whole.getvalue())

    def load(self, folder: Path) -> History | None:
        path = folder / "checkpoint.pt"
        if not path.is_file():
            return None
        try:
            # On the CPU: an optimizer whose step counters lie on a GPU waits for it at every step.
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, UnpicklingError) as error:
            problem = UsageError(f"{path} is damaged ({' '.join(str(error).split())[:100]})")
            raise set_aside(path, "train anew", problem) from None
        indices, history = state.get("topology") or ({}, [])
        if indices:
            average = None if self.ema is None else self.ema.module
            self.topology.restore(indices, history, average)
            self.scattered = scatterer(self.model, self.config, device_of(self.model))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.updates = state["updates"]
        advance(self.scheduler, self.updates)
        return History.of_state(state["history"])


def set_up(model: nn.Module, config: TrainingConfig, *, sharded: bool = False) -> None:
    """Lay out and prepare a model for training, in place.

    `sharded`: a parameter is whole only while its own module runs (ZeRO 3), so that sparse products
    are not possible.
    """
    multiply_sparse(model, config.sparse_products and not config.compile and not sharded)
    if config.channels_last:
        lay_out(model, channels_last=True)
    if config.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError):
            raise UsageError(
                f"timm's {type(model).__name__} has no activation checkpointing; "
                "leave out training.grad_checkpointing"
            ) from None
