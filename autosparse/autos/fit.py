"""Fit AutoS on a corpus: features at initialization -> survival under IRP."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from autosparse.autos import features
from autosparse.autos.config import FitConfig
from autosparse.autos.network import AutoS
from autosparse.autos.network import check as check_head
from autosparse.core.config import from_plain, plain
from autosparse.core.errors import RunFailed, UsageError, unknown
from autosparse.core.ranges import check_ranges
from autosparse.core.versions import library_versions
from autosparse.corpus.store import Corpus, IRPRun, marker_of
from autosparse.data import sets
from autosparse.data.config import DataConfig
from autosparse.data.sets import DataSource
from autosparse.models import zoo
from autosparse.models.gradients import mean_gradients
from autosparse.models.restore import untouched

EXCLUDABLE = ("run_id", "model", "data", "seed", "label", "levels")
"""What an entry of `exclude` may name."""
RANGES = {
    "holdout": "at least 0 and below 1",
    **dict.fromkeys(("rows_per_run", "epochs", "batch_size"), "at least 1"),
    "learning_rate": "above 0",
}


@dataclass(frozen=True)
class Rows:
    """A sample of weights: features [N, F] and survival as a fraction of the levels [N]."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    @classmethod
    def join(cls, parts: list[Rows]) -> Rows:
        return cls(torch.cat([p.inputs for p in parts]), torch.cat([p.targets for p in parts]))


@dataclass
class FitEpoch:
    """What one epoch of fitting gave."""

    epoch: int
    train_mse: float
    validation_mse: float
    validation_rank_correlation: float
    """Spearman's, of predicted and true survival."""


def check(config: FitConfig) -> None:
    """Raise UsageError for settings that cannot be, before work begins."""
    check_head(config.features, config.head)
    check_ranges(config, RANGES)
    if any(width < 1 for width in config.hidden):
        raise UsageError(f"hidden holds widths of at least 1, got {list(config.hidden)}")


def fit(config: FitConfig, on_epoch: Callable[[FitEpoch], None] | None = None) -> AutoS:
    """Fit AutoS; return the network of the epoch with the lowest validation error, with its card.

    Whole runs are held out for validation; no weight of theirs is trained on. Raises UsageError
    for a corpus with fewer than two finished runs, RunFailed if the loss is not finite.
    """
    check(config)
    if config.head == "survival":
        raise UsageError("the head survival is fitted by fit_heads.fit")
    corpus = Corpus(config.corpus)
    train_ids, held_out_ids = split_runs(corpus, config)
    train = Rows.join([sample_rows(corpus.read(each), config, each) for each in train_ids])
    checked = held_out_ids or train_ids
    held_out = Rows.join([sample_rows(corpus.read(each), config, each) for each in checked])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = AutoS(config.features, config.hidden)
    network.mean.copy_(train.inputs.mean(0))
    network.std.copy_(train.inputs.std(0).clamp(min=1e-6))
    history = _optimise(network, train, held_out, config, on_epoch)
    best = min(history, key=lambda epoch: epoch.validation_mse)
    network.card = {
        **card_of(config, corpus, train_ids, held_out_ids, history, best),
        "rows": {"train": len(train), "validation": len(held_out)},
        "baseline_mse": float((held_out.targets - train.targets.mean()).square().mean()),
    }
    return network.eval()


def card_of(
    config: FitConfig,
    corpus: Corpus,
    train_ids: list[str],
    held_out_ids: list[str],
    history: list[FitEpoch],
    best: FitEpoch,
) -> dict[str, Any]:
    """Return what the card of every fitted AutoS says."""
    return {
        "config": {**plain(config), "corpus": "", "out": ""},
        "corpus": corpus_of(corpus, [*train_ids, *held_out_ids]),
        "trained_on": train_ids,
        "held_out": held_out_ids,
        "history": [vars(epoch) for epoch in history],
        "best": vars(best),
        "versions": library_versions(),
    }


def corpus_of(corpus: Corpus, used: list[str]) -> str:
    """Return the fingerprint of the runs that were used; if all were, that of the corpus."""
    entries = [(name, marker_of(corpus.path / name)["sha256"]) for name in sorted(used)]
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]


def _left_in(corpus: Corpus, config: FitConfig) -> list[str]:
    """Return the runs that no entry of `exclude` matches."""
    rows = {row["run_id"]: row for row in corpus.table()}
    for entry in config.exclude:
        for key in entry:
            if key not in EXCLUDABLE:
                raise unknown("key in exclude", key, EXCLUDABLE)
        left = {
            run: row
            for run, row in rows.items()
            if not all(fnmatchcase(str(row[key]), str(value)) for key, value in entry.items())
        }
        if len(left) == len(rows):
            raise UsageError(f"exclude {entry} matches no run of {corpus.path}")
        rows = left
    return sorted(rows)


def split_runs(corpus: Corpus, config: FitConfig) -> tuple[list[str], list[str]]:
    """Return the runs to fit on and those held out."""
    corpus.folders()
    ids = _left_in(corpus, config)
    if ids and not config.holdout:
        return ids, []
    if len(ids) < 2:
        raise UsageError(
            f"the corpus {corpus.path} has one finished run; fitting needs two, one of them to "
            "validate on"
        )
    count = min(max(1, round(config.holdout * len(ids))), len(ids) - 1)
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(ids), generator=generator).tolist()
    return sorted(ids[place] for place in order[count:]), sorted(ids[p] for p in order[:count])


def sample_rows(run: IRPRun, config: FitConfig, run_id: str) -> Rows:
    """Sample `config.rows_per_run` weights of one run, all with the same chance."""
    gradients = initial_gradients(run)
    contexts = features.contexts(run.initial, gradients)
    total = sum(weight.numel() for weight in run.initial.values())
    generator = generator_for(config, run_id)
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[torch.randperm(total, generator=generator)[: config.rows_per_run]] = True
    inputs, targets, start = [], [], 0
    for name, weight in run.initial.items():
        survival = run.survival[name].flatten()
        for piece in features.layer_features(
            config.features, weight, gradients[name], contexts[name]
        ):
            picked = chosen[start : start + piece.shape[1]]
            inputs.append(piece[:, picked].T)
            start += piece.shape[1]
        targets.append(survival[chosen[start - len(survival) : start]])
    return Rows(torch.cat(inputs), torch.cat(targets).float() / run.levels)


def generator_for(config: FitConfig, run_id: str) -> torch.Generator:
    """Return what the weights of a run are sampled with; every run has draws of its own."""
    return torch.Generator().manual_seed(config.seed * 7919 + int(run_id, 16) % (1 << 31))


@lru_cache(maxsize=1)
def _loaded(config: str) -> DataSource:
    """Load a data set by its config as JSON; kept, since most runs of a corpus share one."""
    return sets.load(from_plain(DataConfig, json.loads(config)))


def initial_gradients(run: IRPRun) -> dict[str, Tensor]:
    """Compute the gradients at init again, by the recipe on the run's card."""
    card = run.card
    source = _loaded(json.dumps(card["config"]["data"], sort_keys=True))
    if source.fingerprint != card["data_fingerprint"]:
        raise UsageError(
            f"run {card['run_id']} was made on other data than {source.name} is now "
            f"({card['data_fingerprint']}, not {source.fingerprint})"
        )
    model = zoo.from_recipe(card["model"])
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in (run.initial | run.rest).items():
            state[name].copy_(tensor)
    recipe = card["gradients"]
    batches = source.score_batches(recipe["samples_per_class"], seed=recipe["seed"])
    weights = {name: model.get_parameter(name) for name in run.initial}
    with untouched(model):
        model.train()
        return mean_gradients(model, weights, batches, nn.functional.cross_entropy)


def _optimise(
    network: AutoS,
    train: Rows,
    held_out: Rows,
    config: FitConfig,
    on_epoch: Callable[[FitEpoch], None] | None,
) -> list[FitEpoch]:
    """Minimise the squared error with Adam; leave the network at its best epoch.

    With nothing held out that is measured on the training rows.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
    steps = config.epochs * math.ceil(len(train) / config.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(config.seed)
    history: list[FitEpoch] = []
    best: tuple[float, dict[str, Any]] = (math.inf, {})
    for epoch in range(config.epochs):
        loss = _fit_epoch(network, train, config.batch_size, optimizer, schedule, generator)
        history.append(FitEpoch(epoch + 1, loss, *validate(network, held_out)))
        if not math.isfinite(history[-1].validation_mse):
            raise RunFailed(
                f"the loss of AutoS is not finite in epoch {epoch + 1}; lower learning_rate"
            )
        if history[-1].validation_mse < best[0]:
            best = (history[-1].validation_mse, copy.deepcopy(network.state_dict()))
        if on_epoch:
            on_epoch(history[-1])
    network.load_state_dict(best[1])
    return history


def _fit_epoch(network, train, batch_size, optimizer, schedule, generator) -> float:
    network.train()
    total = torch.zeros(())
    order = torch.randperm(len(train), generator=generator)
    for places in order.split(batch_size):
        loss = nn.functional.mse_loss(network(train.inputs[places]), train.targets[places])
        update(loss, optimizer, schedule)
        total += loss.detach() * len(places)
    return float(total) / len(train)


def update(loss: Tensor, optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> None:
    """Make one step of the optimizer and of its schedule."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()


@torch.no_grad()
def validate(network: AutoS, rows: Rows) -> tuple[float, float]:
    """Return mean squared error and Spearman's rank correlation on `rows`."""
    network.eval()
    predicted = torch.cat([network(part) for part in rows.inputs.split(1 << 16)])
    return errors(predicted, rows.targets)


def errors(predicted: Tensor, true: Tensor) -> tuple[float, float]:
    """Return mean squared error and Spearman's rank correlation (0 where it is not defined)."""
    pair = torch.stack([ranks(predicted), ranks(true)])
    correlation = float(torch.nan_to_num(torch.corrcoef(pair)[0, 1]))
    return float((predicted - true).square().mean()), correlation


def ranks(values: Tensor) -> Tensor:
    """Return ranks, equal values sharing their mean rank."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[place]
