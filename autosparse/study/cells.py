"""The trainings that a config asks for: of tickets, of what it prunes itself, or dense.

A cell is one ticket (or the dense model) with one training config. Its folder is named by the
ticket's file and a hash of all that the result depends on; `result.json` is written last.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from autosparse import criteria
from autosparse.core.config import from_plain, plain, run_id
from autosparse.core.errors import UsageError
from autosparse.core.files import check_folder, local_place, read_json
from autosparse.core.locks import claimed
from autosparse.corpus.store import data_name
from autosparse.criteria import pruning
from autosparse.criteria.config import PruneConfig
from autosparse.criteria.pruning import DENSE, prune, prune_as
from autosparse.data import identity, sets
from autosparse.data.config import DataConfig
from autosparse.models import zoo
from autosparse.models.config import ModelConfig
from autosparse.sparsity import masks
from autosparse.sparsity.ticket import Ticket
from autosparse.study.config import SparseTrainConfig
from autosparse.training.checks import check_whole
from autosparse.training.steppers import Ranks, set_up
from autosparse.training.topology.gradual import SCHEDULES
from autosparse.training.topology.moving import METHODS

RESULT = "result.json"
SHAPE = ("num_classes", "in_chans", "image_size")
"""Settings in which a model and its data must agree."""
NOTHING_TO_TRAIN = (
    "give tickets, or what to prune (--prune.criterion …), or a model to train dense "
    "(--model.name …)"
)
ONE_PROCESS = Ranks()


@dataclass(frozen=True)
class Cell:
    """One training to be done."""

    name: str
    ticket: Ticket
    data: DataConfig
    seed: int
    folder: Path

    @property
    def done(self) -> bool:
        """Whether its result is there."""
        return (self.folder / RESULT).is_file()

    def result(self) -> dict[str, Any]:
        """Return the result of a finished cell."""
        return read_json(self.folder / RESULT)


def cells(
    config: SparseTrainConfig, *, ranks: Ranks = ONE_PROCESS, device: str = "cpu"
) -> Iterator[Cell]:
    """Yield the cells of a config: one per ticket file, or what is pruned now, or the dense model.

    Where there are several ranks, all of them call this: rank 0 looks for tickets and tells the
    others, and they prune together.
    """
    config = settled(config)
    if config.tickets:
        patterns = [config.tickets] if isinstance(config.tickets, str) else config.tickets
        for path in ranks.first_says(lambda: _expand(patterns)):
            yield ranks.first_says(lambda path=path: _ticket_cell(config, path))
    elif config.prune:
        yield _pruned_cell(config, config.prune, ranks, device)
    else:
        yield ranks.first_says(lambda: _dense_cell(config))


def settled(config: SparseTrainConfig) -> SparseTrainConfig:
    """Use the training's model and data for pruning too, unless `prune` names others."""
    asked = config.prune
    if asked is None or config.tickets:
        return config
    model, data = asked.model, asked.data
    if config.model is not None and model not in (ModelConfig(), config.model):
        raise UsageError(
            f"prune.model is {model.name} and model {config.model.name}: they are two models; "
            "leave one of them out"
        )
    if config.model is not None:
        model = config.model
    if config.data is not None and data == DataConfig():
        data = config.data
    return replace(config, prune=replace(asked, model=model, data=data))


def check_config(config: SparseTrainConfig, world_size: int = 1) -> None:
    """Raise UsageError for all that the settings alone show to be wrong, before work begins."""
    check_whole(config.training, world_size)
    check_folder(local_place(config.out))
    config = settled(config)
    if config.training.topology in SCHEDULES and (config.tickets or config.prune):
        raise UsageError(
            f"training.topology {config.training.topology} begins with the dense model; leave out "
            "tickets and prune, and name the model"
        )
    if config.tickets:
        if config.data is not None:
            sets.check_config(config.data)
        return
    if config.prune:
        pruning.check(config.prune)
        data, model = config.data or config.prune.data, config.prune.model
        _check_shapes(sets.shape(config.prune.data), data, "what is pruned")
    elif config.model:
        if config.training.topology in METHODS:
            raise UsageError(
                f"training.topology {config.training.topology} moves the weights of a ticket, and "
                "the dense model has none; give tickets, or what to prune"
            )
        data, model = config.data or DataConfig(), config.model
    else:
        raise UsageError(NOTHING_TO_TRAIN)
    built = pruning.check_model(model, data)
    if config.training.grad_checkpointing:
        set_up(built, config.training)


def _check_shapes(wanted: Any, data: DataConfig, what: str) -> None:
    """Raise UsageError if data do not fit a model, as far as their settings tell."""
    offered = sets.shape(data)
    for key in SHAPE:
        mine, theirs = getattr(wanted, key, None), getattr(offered, key)
        if mine is not None and theirs is not None and mine != theirs:
            raise UsageError(
                f"{what} has {key} {mine}, the data {data_name(plain(data))} {theirs}; set "
                f"{'data.image_size' if key == 'image_size' else 'data'} alike"
            )


def _ticket_cell(config: SparseTrainConfig, path: Path, data: DataConfig | None = None) -> Cell:
    ticket = Ticket.load(path)
    empty = masks.first_empty(ticket.masks)
    allowed = ticket.card.get("selection", {}).get("guard") == "none"
    if empty is not None and not allowed:
        raise UsageError(f"{path} empties a layer: {empty} keeps no weight; prune it again")
    seed = config.seed if config.seed is not None else int(ticket.card.get("seed", 0))
    return _cell(config, path.stem, ticket, data or _data(config, ticket, path), seed)


def _pruned_cell(config: SparseTrainConfig, asked: PruneConfig, ranks: Ranks, device: str) -> Cell:
    """Prune as `asked`, once; the ticket's file is found the next time."""
    path = ranks.first_says(lambda: _scored_path(config, asked))
    cell = ranks.first_says(lambda: _scored(config, asked, path))
    if cell is not None:
        return cell
    wanted = replace(asked, device=device)
    if ranks.world_size > 1:
        ticket = prune_as(wanted, ranks=ranks)
        return ranks.first_says(lambda: _saved(config, asked, path, lambda: ticket))
    return _saved(config, asked, path, lambda: prune_as(wanted))


def _scored_path(config: SparseTrainConfig, asked: PruneConfig) -> Path:
    """Return where the ticket goes: named by all that makes it."""
    used = pruning.criteria_of(asked)
    beyond = [criteria.get(name).beyond(options) for name, options in used]
    more = [json.dumps(each, sort_keys=True) for each in beyond if each]
    key = run_id(asked, *more)
    name = f"{asked.model.name}-{asked.criterion}-{asked.sparsity:g}-{key}"
    return local_place(config.out) / "tickets" / f"{name}.safetensors"


def _scored(config: SparseTrainConfig, asked: PruneConfig, path: Path) -> Cell | None:
    """Return the cell of a ticket that is there, if it was scored on the data that are there."""
    if not path.is_file():
        identity.tell_of_former(lambda: _scored_path(config, asked), "")
        return None
    cell = _ticket_cell(config, path, config.data or asked.data)
    there = sets.if_there(asked.data)
    sets.check_found(cell.ticket.card.get("data_fingerprint"), there, path)
    return cell


def _saved(
    config: SparseTrainConfig, asked: PruneConfig, path: Path, make: Callable[[], Ticket]
) -> Cell:
    """Make and save a ticket, unless another process is at it: wait for that one's then."""
    with claimed(path.parent, wait=True, finished=path.is_file, name=f"{path.stem}.claim"):
        if not path.is_file():
            make().save(path)
    return _ticket_cell(config, path, config.data or asked.data)


def _dense_cell(config: SparseTrainConfig) -> Cell:
    if config.model is None:
        raise UsageError(NOTHING_TO_TRAIN)
    data, seed = config.data or DataConfig(), config.seed or 0
    source = sets.load(data)
    model = zoo.create_for(source, config.model, seed)
    return _cell(config, DENSE, prune(model, data, DENSE, seed=seed), data, seed)


def _cell(
    config: SparseTrainConfig, name: str, ticket: Ticket, data: DataConfig, seed: int
) -> Cell:
    _check_shapes(SimpleNamespace(**ticket.card.get("model", {})), data, f"the model of {name}")

    def folder() -> Path:
        key = run_id(config, ticket.content_hash, run_id(data), str(seed))
        return local_place(config.out) / f"{name}-{key}"

    identity.tell_of_former(folder, RESULT)
    return Cell(name, ticket, data, seed, folder())


def _expand(patterns: list[str]) -> list[Path]:
    paths = []
    for pattern in map(os.path.expanduser, patterns):
        files = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]  # noqa: PTH207
        if not files:
            raise UsageError(f"no ticket matches {pattern}")
        paths += [Path(each) for each in files]
    return paths


def _data(config: SparseTrainConfig, ticket: Ticket, path: Path) -> DataConfig:
    if config.data is not None:
        return config.data
    described = ticket.card.get("data", {})
    if "image_size" not in described:
        raise UsageError(f"{path} does not say which data it was made on; set data.name")
    return from_plain(DataConfig, described)
