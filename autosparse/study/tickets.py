"""The tickets of a study: each made once, kept with its inverted twin, found by its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from autosparse.core.locks import claimed
from autosparse.corpus.store import read_run
from autosparse.criteria import pruning, scoring
from autosparse.criteria.card import finish_card
from autosparse.criteria.pruning import DENSE
from autosparse.data import sets
from autosparse.data.sets import DataSource
from autosparse.irp import run as irp
from autosparse.models import zoo
from autosparse.sparsity import twins as controls
from autosparse.sparsity.ticket import Ticket
from autosparse.study.grid import StudyCell
from autosparse.study.labels import IRP, criterion_of, irp_config, selection


def ticket_of(cell: StudyCell, source: DataSource) -> Ticket:
    """Make or find the ticket of a cell; a twin is made from the ticket itself.

    Raises UsageError where it was made on other data of the same name than `source`.
    """
    if cell.label == DENSE:
        model = zoo.create_for(source, cell.config.model, cell.seed)
        return pruning.prune(model, source, DENSE, seed=cell.seed)
    path = Path(cell.config.out) / "tickets" / f"{cell.ticket_key}.safetensors"
    opposite = path.with_name(f"{path.stem}-inverted.safetensors")

    def there() -> bool:
        return path.exists() and opposite.exists()

    if not there():
        with claimed(path.parent, wait=True, finished=there, name=f"{path.stem}.claim"):
            if not there():
                ticket, twin = _make(cell, source)
                twin.save(opposite)
                ticket.save(path)
    ticket = Ticket.load(path)
    sets.check_found(ticket.card.get("data_fingerprint"), source, path)
    if cell.twin == controls.INVERTED:
        return Ticket.load(opposite)
    if cell.twin == controls.SHUFFLED:
        return controls.shuffled_twin(ticket, _start(cell, ticket, source))
    if cell.twin == controls.REINITIALISED:
        return controls.reinitialised_twin(ticket)
    return ticket


def _make(cell: StudyCell, source: DataSource) -> tuple[Ticket, Ticket]:
    """Return a ticket and its inverted twin, which needs the scores."""
    config = cell.config
    name, options = criterion_of(config, cell.label)
    if name == IRP:
        return _make_by_irp(cell, options, source)
    model = zoo.create_for(source, config.model, cell.seed)
    model.to(zoo.choose_device(config.device))
    scored, card = scoring.score(
        model,
        source,
        name,
        cell.sparsity,
        selection=selection(config, cell.label),
        scoring=config.scoring,
        seed=cell.seed,
        options=options,
    )
    ticket = pruning.choose(model, scored, card)
    scores = scored.scores
    if scored.masks is not None:  # No scores: the inverted twin is drawn from what was pruned.
        chosen = {name: mask.cpu() for name, mask in scored.masks.items()}
        scores = controls.survival_scores(chosen, cell.seed)
    return ticket, controls.inverted_twin(ticket, model, scores)


def _make_by_irp(
    cell: StudyCell, options: dict[str, Any], source: DataSource
) -> tuple[Ticket, Ticket]:
    settings = irp_config(cell.config, options, cell.sparsity, cell.seed)
    run = read_run(irp.run_irp(settings, wait=True))  # Another cell may be making the same run.
    ticket = run.ticket(run.levels)
    model = _start(cell, ticket, source)
    shape = (source.in_chans, source.image_size, source.image_size)
    ticket = replace(ticket, card=finish_card(model, ticket.masks, shape, ticket.card))
    scores = controls.survival_scores(run.survival, cell.seed)
    return ticket, controls.inverted_twin(ticket, model, scores)


def _start(cell: StudyCell, ticket: Ticket, source: DataSource) -> nn.Module:
    """Return the dense model whose values the ticket keeps."""
    model = zoo.create_for(source, cell.config.model, cell.seed)
    run = ticket.card.get("options", {}).get("run_id")
    if ticket.card.get("rewind_steps") and run is not None:
        model.load_state_dict(read_run(Path(cell.config.out) / "corpus" / run).rewound)
    return model
