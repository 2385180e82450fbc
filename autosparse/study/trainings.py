"""Train cells, each into its own folder; a cell whose result is there is not trained again.

A claim keeps other processes out of a cell. Of several ranks, only rank 0 reads and writes files.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import nn

from autosparse.core.config import plain
from autosparse.core.errors import Stopped, UsageError, unknown
from autosparse.core.files import write_json
from autosparse.core.locks import Claim, claimed
from autosparse.core.versions import environment
from autosparse.criteria.card import dead_line, finish_card, refuse_dead
from autosparse.criteria.pruning import DEAD
from autosparse.data import identity, sets
from autosparse.data.memory import MemorySplit
from autosparse.data.sets import DataSource
from autosparse.models import zoo
from autosparse.sparsity.slim_training import Slimmed, slim_for_training
from autosparse.sparsity.ticket import Ticket, compact
from autosparse.study.cells import ONE_PROCESS, RESULT, SHAPE, Cell
from autosparse.study.config import SparseTrainConfig
from autosparse.study.flops import of_ticket
from autosparse.training.loop import (
    Span,
    Watch,
    evaluate,
    fit,
    seeded,
    steps_per_epoch,
    training_images,
)
from autosparse.training.steppers import Epoch, Ranks, Stepper

TRAINED = "trained.safetensors"
CHECKPOINTS, UNSENT = "deepspeed", "mlflow_unsent.json"
SETTINGS = "settings.json"
"""The settings of a training and the machine it ran on, of its last start."""
MakeStepper = Callable[[nn.Module, int], Stepper]
"""(compact model on its device, steps per epoch) -> Stepper."""


def unsent(cell: Cell) -> bool:
    """Whether metrics or files of a cell wait to be sent to MLflow."""
    return (cell.folder / UNSENT).is_file()


class Observer(Protocol):
    """What logs trainings; see integrations/mlflow.py."""

    def found(self, cell: Cell, config: SparseTrainConfig) -> None: ...

    def begin(self, cell: Cell, config: SparseTrainConfig, settings: dict[str, Any]) -> None: ...

    def epoch(self, cell: Cell, epoch: Epoch) -> None: ...

    def stopped(self, cell: Cell) -> None: ...

    def failed(self, cell: Cell, reason: str) -> None: ...

    def end(self, cell: Cell, result: dict[str, Any]) -> None: ...


def train_cell(
    cell: Cell,
    config: SparseTrainConfig,
    source: DataSource,
    make_stepper: MakeStepper,
    *,
    device: str,
    ranks: Ranks = ONE_PROCESS,
    observer: Observer | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    watch: Watch | None = None,
    stop: Callable[[], bool] | None = None,
    wait: bool = False,
) -> dict[str, Any]:
    """Train one cell on this rank, write its trained ticket and result, and return the result.

    `observer` is given on rank 0 only. The test split is looked at once, at the end. `watch` and
    `stop` are those of `training.fit`. Another process that is at this cell is waited for if
    `wait` says so; otherwise it is a UsageError. All ranks call this; rank 0 looks and tells.
    """
    result = finished(cell, ranks, source)
    if result is None:
        with _claimed(cell, ranks, wait) as claim:
            result = finished(cell, ranks, source)  # By another process, meanwhile.
            if result is None:
                training = _Training(cell, config, source, ranks, observer, claim)
                return training.run(make_stepper, device, on_epoch, watch, stop)
    if observer:
        observer.found(cell, config)
    return result


def finished(
    cell: Cell, ranks: Ranks = ONE_PROCESS, source: DataSource | None = None
) -> dict[str, Any] | None:
    """Return the result of a finished cell, as rank 0 finds it, on every rank; None if to do.

    Raises UsageError where it was trained on other data of the same name than `source`.
    """

    def look() -> dict[str, Any] | None:
        if not cell.done:
            return None
        result = cell.result()
        sets.check_found(result.get("data_fingerprint"), source, cell.folder)
        return result

    return ranks.first_says(look)


@contextmanager
def _claimed(cell: Cell, ranks: Ranks, wait: bool) -> Iterator[Claim | None]:
    """Hold a cell's folder on rank 0; where another process has it, all ranks are told."""
    with ExitStack() as held:
        claim: list[Claim | None] = [None]

        def take() -> None:
            claim[0] = held.enter_context(
                claimed(cell.folder, wait=wait, finished=lambda: cell.done)
            )

        ranks.first_says(take)
        yield claim[0]


@dataclass(frozen=True)
class _Training:
    """One cell being trained."""

    cell: Cell
    config: SparseTrainConfig
    source: DataSource
    ranks: Ranks
    observer: Observer | None
    claim: Claim | None
    """Of the cell's folder; on rank 0 only."""

    def run(
        self,
        make_stepper: MakeStepper,
        device: str,
        on_epoch: Callable[[Epoch], None] | None,
        watch: Watch | None,
        stop: Callable[[], bool] | None,
    ) -> dict[str, Any]:
        """Train and evaluate; rank 0 writes the trained ticket and the result."""
        cell, config, source, ranks = self.cell, self.config, self.source, self.ranks
        _tell_dead(cell, config.dead, ranks)
        model, slimmed = build(cell.ticket, source, slim=config.training.slim)
        model = model.to(zoo.choose_device(device))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        steps = steps_per_epoch(source.train, config.training, ranks.world_size)
        stepper = make_stepper(model, steps)
        settings = _settings(cell, config, stepper)
        if self.observer:
            self.observer.begin(cell, config, settings)

        def note(epoch: Epoch) -> None:
            ranks.first_says(self.check_claim)
            if self.observer:
                self.observer.epoch(cell, epoch)
            if on_epoch:
                on_epoch(epoch)

        # 131 is above the number of ranks that is usual, so that cells and ranks differ in seed.
        with seeded(cell.seed * 131 + ranks.rank), _told(self.observer, cell):
            history = fit(
                stepper,
                source,
                config.training,
                seed=cell.seed,
                folder=cell.folder,
                on_epoch=note,
                span=Span(cell.ticket.card.get("rewind_steps", 0)),
                watch=watch,
                stop=stop,
            )
            test = evaluate(stepper.evaluated(), source, source.test, ranks, config.training)
            state = stepper.state_dict()
            result = _result(cell, parameters, history.plain(), test.accuracy, test.loss)
            passes = training_images(source.train, config.training, ranks.world_size)
            result["training_passes"] = passes
            result["device"] = zoo.device_name(zoo.device_of(model))
            result["data_fingerprint"] = source.fingerprint
            result["test_fingerprint"] = test_fingerprint(source)

            def finish() -> None:
                ticket = Ticket.from_compact(
                    model, slimmed.ticket if slimmed else cell.ticket, _card_to_train(cell), state
                )
                self.finish(slimmed.whole(ticket) if slimmed else ticket, settings, result)

            ranks.first_says(finish)
        if self.observer:
            self.observer.end(cell, result)
        return result

    def check_claim(self) -> None:
        """Raise RunFailed where another process has taken the cell's folder; on rank 0."""
        if self.claim:
            self.claim.check()

    def finish(self, ticket: Ticket, settings: dict[str, Any], result: dict[str, Any]) -> None:
        """Write all files, the result last; then remove checkpoints."""
        self.check_claim()
        write_json(self.cell.folder / SETTINGS, settings)
        _finish(self.cell, self.config, ticket, result)


def test_fingerprint(source: DataSource) -> str:
    """Return 16 hex digits of the test images and labels: what the test accuracy was measured on.

    Streamed data are known as a whole, by their content and the size of images.
    """
    if isinstance(source.test, MemorySplit):
        return source.test.fingerprint()
    content = identity.content(source.config) or source.fingerprint
    return f"{content}-{source.image_size}"


def _tell_dead(cell: Cell, dead: str, ranks: Ranks) -> None:
    """Warn of a ticket that is known to be dead, or refuse it, before it is trained."""
    if dead not in DEAD:
        raise unknown("value of dead", dead, DEAD)
    if dead == "error":
        refuse_dead(cell.ticket.card)
    elif "dead" in cell.ticket.card and ranks.rank == 0:
        warnings.warn(f"{cell.name}: {dead_line(cell.ticket.card)}", stacklevel=3)


@contextmanager
def _told(observer: Observer | None, cell: Cell) -> Iterator[None]:
    """Tell the observer if the training is stopped, or fails."""
    try:
        yield
    except (Stopped, KeyboardInterrupt):
        if observer:
            observer.stopped(cell)
        raise
    except Exception as error:
        if observer:
            observer.failed(cell, str(error))
        raise


def _settings(cell: Cell, config: SparseTrainConfig, stepper: Stepper) -> dict[str, Any]:
    return {
        "config": {**plain(config), "data": plain(cell.data), "seed": cell.seed},
        "deepspeed": stepper.settings,
        "ranks": stepper.ranks.world_size,
        "device": zoo.device_name(zoo.device_of(stepper.model)),
        "environment": environment(),
    }


def build(
    ticket: Ticket, source: DataSource, *, slim: bool = False
) -> tuple[nn.Module, Slimmed | None]:
    """Build the ticket's model, compact, on the CPU; with `slim`, without units that nobody reads.

    Raises UsageError if the data do not fit it, or if it cannot be made smaller.
    """
    recipe = ticket.card.get("model", {})
    for key in SHAPE:
        if recipe.get(key) != getattr(source, key):
            raise UsageError(
                f"the ticket's model has {key} {recipe.get(key)}, the data {source.name} "
                f"{getattr(source, key)}"
            )
    model = zoo.from_recipe(recipe)
    if not slim:
        return compact(model, ticket), None
    slimmed = slim_for_training(model, ticket)
    return compact(slimmed.model, slimmed.ticket), slimmed


def _result(
    cell: Cell, parameters: int, history: list[dict], accuracy: float, loss: float
) -> dict[str, Any]:
    card = cell.ticket.card
    return {
        "name": cell.name,
        "model": card["model"]["name"],
        "criterion": card.get("criterion", "unknown"),
        "sparsity": round(card.get("sparsity", cell.ticket.sparsity), 6),
        "seed": cell.seed,
        "test_accuracy": accuracy,
        "test_loss": loss,
        "validation_accuracy": history[-1]["validation_accuracy"],
        "parameters": parameters,
        "kept": cell.ticket.kept,
        "seconds": round(sum(epoch["seconds"] for epoch in history), 3),
        "prune_seconds": card.get("seconds", 0.0),
        "image_passes": card.get("image_passes", 0.0),
        "effective_density": card.get("effective_density"),
        "fingerprint": cell.ticket.fingerprint,
        "history": history,
    }


def _after_moving(ticket: Ticket) -> Ticket:
    """Return a ticket whose masks have moved with a card that describes its last masks."""
    recipe, card = ticket.card["model"], dict(ticket.card)
    for key in ("live", "effective_density", "dead", "paths", "units_left"):
        card.pop(key, None)
    card["sparsity"] = card["topology"].get("sparsity", card.get("sparsity", ticket.sparsity))
    shape = (recipe["in_chans"], recipe["image_size"], recipe["image_size"])
    model = zoo.from_recipe(recipe)
    return replace(ticket, card=finish_card(model, ticket.masks, shape, card))


def _card_to_train(cell: Cell) -> dict[str, Any]:
    return {key: value for key, value in cell.ticket.card.items() if key != "topology"}


def _finish(cell: Cell, config: SparseTrainConfig, ticket: Ticket, result: dict[str, Any]) -> None:
    path = cell.folder / TRAINED
    trained = {key: value for key, value in result.items() if key != "history"}
    if "topology" in ticket.card:
        ticket = _after_moving(ticket)
        changed = {
            "sparsity": round(ticket.card["sparsity"], 6),
            "kept": ticket.kept,
            "effective_density": ticket.card.get("effective_density"),
            "trained_fingerprint": ticket.fingerprint,
        }
        result |= {**changed, "topology": ticket.card["topology"]}
        trained |= changed
    ticket.with_card(trained=trained, training=plain(config.training)).save(path)
    result["checkpoint_bytes"] = path.stat().st_size
    result |= of_ticket(ticket, config.training, result["training_passes"])
    write_json(cell.folder / RESULT, result)
    for checkpoint in ("checkpoint.pt", CHECKPOINTS):
        target = cell.folder / checkpoint
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
    for name in (RESULT, TRAINED, SETTINGS, "checkpoint.pt"):  # Of starts that were killed.
        for cut in cell.folder.glob(f".{name}.*.tmp"):
            cut.unlink(missing_ok=True)
