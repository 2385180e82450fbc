"""Compare criteria, each ticket with its twins, seed by seed: does the choice of weights matter?

A cell is one training: a dense network, a ticket, or a twin of one. Its folder is named by a hash
of all that makes it, so a comparison that was killed goes on with the same command, and cells may
be run in any order, by anyone (`run_cell`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autosparse import criteria
from autosparse.core.config import from_plain, identity, run_id
from autosparse.core.errors import UsageError, unknown
from autosparse.core.files import check_folder, read_json
from autosparse.core.locks import claimed
from autosparse.corpus.store import read_run
from autosparse.criteria import prune, scoring
from autosparse.criteria.prune import DENSE
from autosparse.criteria.scoring import Selection
from autosparse.data import identity as data_identity
from autosparse.data import sets
from autosparse.data.sets import DataSource
from autosparse.irp import run as irp
from autosparse.irp.config import IRPConfig
from autosparse.models import zoo
from autosparse.sparsity import twins as controls
from autosparse.sparsity.counts import check_sparsity
from autosparse.sparsity.ticket import Ticket
from autosparse.study.config import CompareConfig, SparseTrainConfig
from autosparse.study.trainings import RESULT, Cell, Observer, train_cell
from autosparse.training.steppers import Epoch, PlainStepper, check, check_plain

IRP = "irp"
BASELINES = ("erk", "uniform")
TICKET = "ticket"
ALL_TWINS = (*controls.TWINS, *BASELINES)


@dataclass(frozen=True)
class Trial:
    """One training of a comparison."""

    label: str
    """A criterion, or a name that `options` says more about; a baseline; or dense."""
    twin: str
    """ticket, or what kind of twin of it."""
    sparsity: float
    seed: int

    @property
    def name(self) -> str:
        """For folders and progress bars."""
        twin = "" if self.twin == TICKET else f"-{self.twin}"
        return f"{self.label}{twin}-{self.sparsity * 100:g}-seed{self.seed}"


def labels(config: CompareConfig) -> list[str]:
    """Return the criteria to compare, by the names they have in the comparison."""
    return _listed(config.criteria, str)


def _listed(value: Any, kind: Callable[[str], Any]) -> list[Any]:
    """Return a list, or the parts of a text with commas."""
    if isinstance(value, str):
        value = [part for part in (each.strip() for each in value.split(",")) if part]
    elif not isinstance(value, list):
        value = [value]
    try:
        return [kind(each) for each in value]
    except ValueError:
        raise UsageError(f"{value} is no list of {kind.__name__}s") from None


def sparsities(config: CompareConfig) -> list[float]:
    """Return the sparsities."""
    return [check_sparsity(each) for each in _listed(config.sparsities, float)]


def seeds(config: CompareConfig) -> list[int]:
    """Return the seeds."""
    return _listed(config.seeds, int)


def criterion_of(config: CompareConfig, label: str) -> tuple[str, dict[str, Any]]:
    """Return the criterion that a label stands for, and its options."""
    options = dict(config.options.get(label, {}))
    return options.pop("criterion", "random" if label == "uniform" else label), options


def check_config(config: CompareConfig) -> None:
    """Raise UsageError for what cannot be, before anything is trained."""
    check(config.training)
    selection(config).check()
    scoring.check_scoring(config.scoring)
    if not labels(config) or not sparsities(config) or not seeds(config):
        raise UsageError("compare needs at least one criterion, one sparsity and one seed")
    for label in config.options:
        if label not in (*labels(config), *BASELINES):
            raise unknown("label in options", label, labels(config))
    for label in labels(config):
        name, options = criterion_of(config, label)
        if name == IRP:
            _irp_config(config, options, 0.5, 0)
        else:
            criterion = criteria.get(name)
            criterion.check_whole(options, filled=("sparsity", "seed"))
            selection(config, label).check_for(criterion, options)
    for twin in config.twins:
        if twin not in ALL_TWINS:
            raise unknown("twin", twin, ALL_TWINS)


def check_whole(config: CompareConfig) -> None:
    """Raise UsageError for all that the settings alone show to be wrong, before work begins."""
    check_config(config)
    check_plain(config.training)
    zoo.choose_device(config.device)
    prune.check_model(config.model, config.data)
    check_folder(config.out)


def trials(config: CompareConfig) -> list[Trial]:
    """Return all trainings: per seed the dense one, every ticket with its twins, the baselines."""
    check_config(config)
    twins = [TICKET, *(twin for twin in config.twins if twin in controls.TWINS)]
    baselines = [name for name in BASELINES if name in config.twins and name not in labels(config)]
    found = []
    for seed in seeds(config):
        found.append(Trial(DENSE, TICKET, 0.0, seed))
        for sparsity in sparsities(config):
            found += [
                Trial(label, twin, sparsity, seed) for label in labels(config) for twin in twins
            ]
            found += [Trial(name, TICKET, sparsity, seed) for name in baselines]
    return found


def selection(config: CompareConfig, label: str = "") -> Selection:
    """Return how the scores of a label become masks; a uniform baseline has its own allocation."""
    if label == "uniform":
        return Selection(scope="layer", guard=config.guard)
    if label == "erk":
        return Selection(guard=config.guard)
    return Selection(config.scope, config.allocation, config.allocation_options, config.guard)


def folder_of(config: CompareConfig, trial: Trial) -> Path:
    """Return the folder of a trial's result."""
    return Path(config.out) / "cells" / f"{trial.name}-{_key(config, trial, trained=True)}"


def is_done(config: CompareConfig, trial: Trial) -> bool:
    """Return whether the trial's result is there."""
    return (folder_of(config, trial) / RESULT).is_file()


def _key(config: CompareConfig, trial: Trial, *, trained: bool) -> str:
    """Return a hash of all that makes a trial's ticket, and of its training.

    A criterion's defaults are part of it: where one changes, what was trained before is not found.
    """
    name, asked = criterion_of(config, trial.label)
    criterion = None if name in (DENSE, IRP) else criteria.get(name)
    options = (criterion.defaults if criterion else {}) | asked
    parts = [run_id(config.model), run_id(config.data), run_id(config.scoring), str(trial)]
    parts += [name, str(sorted(options.items())), str(selection(config, trial.label))]
    if trained or name == IRP:
        parts.append(run_id(config.training))
    if criterion:
        parts.append(str(criterion.provenance(**asked)) if criterion.provenance else "")
    parts += _beyond(config, name, asked)
    return run_id(config.model, *parts)


def _beyond(config: CompareConfig, name: str, asked: dict[str, Any]) -> list[str]:
    """Return what else a ticket hangs on that is not as in the first version; [] if all is."""
    found = {}
    if name == IRP:
        settled = (*_settled(config, 0.5, 0), *asked)
        changed = identity(_irp_config(config, asked, 0.5, 0))
        found = {key: each for key, each in changed.items() if key not in settled}
    if config.allocation not in (None, scoring.UNIFORM):
        found |= criteria.get(config.allocation).beyond(config.allocation_options)
    return [str(sorted(found.items()))] if found else []


def load(config: CompareConfig) -> DataSource:
    """Return the data on the device."""
    return sets.load(config.data).to(zoo.choose_device(config.device))


def run_trial(
    config: CompareConfig,
    trial: Trial,
    source: DataSource,
    *,
    observer: Observer | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> dict[str, Any]:
    """Train one trial, or find its result; `source` is what `load` gave."""
    folder = folder_of(config, trial)
    if is_done(config, trial):
        result = read_json(folder / RESULT)
        sets.check_found(result.get("data_fingerprint"), source, folder)
    else:
        data_identity.tell_of_former(lambda: folder_of(config, trial), RESULT)
        training = SparseTrainConfig(training=config.training, seed=trial.seed)
        ticket = ticket_of(config, trial, source)
        result = train_cell(
            Cell(trial.name, ticket, config.data, trial.seed, folder),
            training,
            source,
            lambda model, steps: PlainStepper(model, config.training, steps),
            device=str(zoo.choose_device(config.device)),
            observer=observer,
            on_epoch=on_epoch,
            wait=True,
        )
    place = {"label": trial.label, "twin": trial.twin, "sparsity": trial.sparsity}
    return {**result, **place, "cell": folder.name}


def ticket_of(config: CompareConfig, trial: Trial, source: DataSource) -> Ticket:
    """Make (or find) the ticket of a trial; twins are made from that of the ticket itself."""
    own = replace(trial, twin=TICKET)
    if trial.label == DENSE:
        model = zoo.create_for(source, config.model, trial.seed)
        return prune.prune(model, source, DENSE, seed=trial.seed)
    key = f"{own.name}-{_key(config, own, trained=False)}"
    path = Path(config.out) / "tickets" / f"{key}.safetensors"
    opposite = path.with_name(f"{key}-inverted.safetensors")

    def there() -> bool:
        return path.exists() and opposite.exists()

    if not there():
        with claimed(path.parent, wait=True, finished=there, name=f"{key}.claim"):
            if not there():
                ticket, twin = _make(config, own, source)
                twin.save(opposite)
                ticket.save(path)
    if trial.twin == controls.INVERTED:
        return Ticket.load(opposite)
    ticket = Ticket.load(path)
    if trial.twin == controls.SHUFFLED:
        return controls.shuffled_twin(ticket, _start(config, ticket, source, trial.seed))
    if trial.twin == controls.REINITIALISED:
        return controls.reinitialised_twin(ticket)
    return ticket


def _make(config: CompareConfig, trial: Trial, source: DataSource) -> tuple[Ticket, Ticket]:
    """Return a ticket and its inverted twin, which needs the scores."""
    name, options = criterion_of(config, trial.label)
    if name == IRP:
        return _make_by_irp(config, options, trial, source)
    model = zoo.create_for(source, config.model, trial.seed)
    model.to(zoo.choose_device(config.device))
    scored, card = scoring.score(
        model,
        source,
        name,
        trial.sparsity,
        selection=selection(config, trial.label),
        scoring=config.scoring,
        seed=trial.seed,
        options=options,
    )
    ticket = prune.choose(model, scored, card)
    scores = scored.scores
    if scored.masks is not None:  # A choice ranks nothing: draw from what it left out.
        chosen = {name: mask.cpu() for name, mask in scored.masks.items()}
        scores = controls.survival_scores(chosen, trial.seed)
    return ticket, controls.inverted_twin(ticket, model, scores)


def _make_by_irp(
    config: CompareConfig, options: dict[str, Any], trial: Trial, source: DataSource
) -> tuple[Ticket, Ticket]:
    settings = _irp_config(config, options, trial.sparsity, trial.seed)
    run = read_run(irp.run_irp(settings, wait=True))  # Other cells may need it as well.
    ticket = run.ticket(run.levels)
    model = _start(config, ticket, source, trial.seed)
    shape = (source.in_chans, source.image_size, source.image_size)
    ticket = replace(ticket, card=prune.finish_card(model, ticket.masks, shape, ticket.card))
    scores = controls.survival_scores(run.survival, trial.seed)
    return ticket, controls.inverted_twin(ticket, model, scores)


def _irp_config(
    config: CompareConfig, options: dict[str, Any], sparsity: float, seed: int
) -> IRPConfig:
    """Return the IRP run that ends at `sparsity`, each level trained as tickets are."""
    settled = _settled(config, sparsity, seed)
    for key in options:
        if key in settled:
            raise UsageError(f"options.irp.{key}: compare settles it itself")
    found = from_plain(IRPConfig, {**settled, **options})
    irp.check(found)
    return found


def _settled(config: CompareConfig, sparsity: float, seed: int) -> dict[str, Any]:
    """Return what options of an IRP run may not say."""
    return {
        "model": config.model,
        "data": config.data,
        "training": config.training,
        "final_density": 1 - sparsity,
        "seed": seed,
        "device": config.device,
        "out": str(Path(config.out) / "corpus"),
        "scope": config.scope,
    }


def _start(config: CompareConfig, ticket: Ticket, source: DataSource, seed: int) -> Any:
    """Return the dense model whose values the ticket keeps."""
    model = zoo.create_for(source, config.model, seed)
    run = ticket.card.get("options", {}).get("run_id")
    if ticket.card.get("rewind_steps") and run is not None:
        model.load_state_dict(read_run(Path(config.out) / "corpus" / run).rewound)
    return model
