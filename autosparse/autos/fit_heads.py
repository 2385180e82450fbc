"""Fit our AutoS: one head for what layers keep, one for which weights (see heads.py).

Both minimise binary cross-entropy at every level of every run, each level weighed by the inverse of
its density. The selection head is given the layers' true densities, so that it learns comparisons
inside layers only. The allocation head is fitted on layers, each weighed by the square root of its
size; every run counts the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autosparse.autos import features
from autosparse.autos.config import FitConfig
from autosparse.autos.fit import (
    FitEpoch,
    card_of,
    check,
    errors,
    generator_for,
    initial_gradients,
    split_runs,
    update,
)
from autosparse.autos.heads import CONSTANTS, Heads, erk_log_odds, interpolation
from autosparse.autos.network import AutoS
from autosparse.core.errors import RunFailed
from autosparse.corpus.store import Corpus, IRPRun

BINS = 20
"""Bins of the calibration curve, of equal width in log-odds."""
SPAN = 7.0
"""The curve covers log-odds from -7 to 7, probabilities from 0.1 to 99.9 %."""
CLOSE = 1e-4
"""Probabilities nearer to 0 or 1 are moved to this distance before their log-odds are taken."""
DECAY = 0.01
"""Weight decay of the allocation head: keeps it near ERK, as it sees some hundred layers only."""
ALLOCATION_STEPS = 400
"""Steps of its fit, each on all layers: those of the packaged AutoS; set by hand, not tuned."""


@dataclass(frozen=True)
class Layers:
    """The L layers of one run: constants [L, C], ERK's log-odds and true densities [L, levels]."""

    constants: Tensor
    erk: Tensor
    truth: Tensor
    sizes: Tensor
    mixes: Tensor
    """[levels, densities of the heads]: how the heads' outputs are mixed at each level."""
    densities: Tensor
    """Of the whole network, [levels]."""


@dataclass(frozen=True)
class Weights:
    """A sample of one run's weights: features [N, F], survival [N], place of their layer [N]."""

    inputs: Tensor
    survival: Tensor
    layer: Tensor


Part = tuple[Layers, Weights]


def fit(config: FitConfig, on_epoch: Callable[[FitEpoch], None] | None = None) -> AutoS:
    """Fit both heads; return the network with its card, which says how calibrated it is.

    Whole runs are held out. The last epoch counts: the network is small, the schedule fixed.
    """
    check(config)
    corpus = Corpus(config.corpus)
    train_ids, held_out_ids = split_runs(corpus, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = AutoS("context", config.hidden, head="survival")
    train = [sample(corpus.read(each), config, each, network.heads) for each in train_ids]
    held_out = [sample(corpus.read(each), config, each, network.heads) for each in held_out_ids]
    whole = torch.cat([weights.inputs for _, weights in train])
    layers = torch.cat([each.constants for each, _ in train])
    network.heads.mean.copy_(torch.cat([whole.mean(0)[:-CONSTANTS], layers.mean(0)]))
    std = torch.cat([whole.std(0)[:-CONSTANTS], layers.std(0)])
    network.heads.std.copy_(std.clamp(min=1e-6))
    fit_allocation(network.heads, [layers for layers, _ in train], config)
    history = _fit_selection(network.heads, train, held_out, config, on_epoch)
    target = torch.cat([_fraction(part) for part in train]).mean()
    checked = held_out or train
    network.card = {
        **card_of(config, corpus, train_ids, held_out_ids, history, history[-1]),
        "rows": {"train": len(whole), "validation": sum(len(w.layer) for _, w in held_out)},
        "baseline_mse": float(
            torch.cat([(_fraction(part) - target).square() for part in checked]).mean()
        ),
        "calibration": calibration(network.heads, checked),
        "allocation_error": allocation_error(network.heads, [layers for layers, _ in checked]),
    }
    return network.eval()


def sample(run: IRPRun, config: FitConfig, run_id: str, heads: Heads) -> Part:
    """Return a run's layers and a sample of its weights: `rows_per_run` in all.

    Each layer gives weights in proportion to the square root of its size.
    """
    gradients = initial_gradients(run)
    contexts = features.contexts(run.initial, gradients)
    generator = generator_for(config, run_id)
    roots = {name: math.sqrt(weight.numel()) for name, weight in run.initial.items()}
    share = config.rows_per_run / sum(roots.values())
    inputs, survival, layer = [], [], []
    for place, (name, weight) in enumerate(run.initial.items()):
        count = min(weight.numel(), round(share * roots[name]))
        picked = torch.randperm(weight.numel(), generator=generator)[:count]
        pieces = features.layer_features("context", weight, gradients[name], contexts[name])
        inputs.append(torch.cat(list(pieces), dim=1)[:, picked].T)
        survival.append(run.survival[name].flatten()[picked])
        layer.append(torch.full((count,), place))
    layers = _layers(run, contexts, heads)
    return layers, Weights(torch.cat(inputs), torch.cat(survival), torch.cat(layer))


def _layers(run: IRPRun, contexts: dict[str, features.Constants], heads: Heads) -> Layers:
    shapes = {name: weight.shape for name, weight in run.initial.items()}
    total = sum(weight.numel() for weight in run.initial.values())
    densities, erk, truth = [], [], []
    for level in range(1, run.levels + 1):
        alive = {n: int((s >= level).count_nonzero()) for n, s in run.survival.items()}
        densities.append(sum(alive.values()) / total)
        erk.append(list(erk_log_odds(shapes, densities[-1]).values()))
        truth.append([alive[name] / shape.numel() for name, shape in shapes.items()])
    return Layers(
        torch.tensor([contexts[name] for name in shapes]),
        torch.tensor(erk).T,
        torch.tensor(truth).T,
        torch.tensor([float(shape.numel()) for shape in shapes.values()]),
        torch.tensor([interpolation(each, heads.densities) for each in densities]),
        torch.tensor(densities),
    )


def fit_allocation(heads: Heads, runs: list[Layers], config: FitConfig) -> None:
    """Fit the allocation head on all layers at once."""
    optimizer = torch.optim.AdamW(
        heads.allocation.parameters(), lr=config.learning_rate, weight_decay=DECAY
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ALLOCATION_STEPS)
    for _ in range(ALLOCATION_STEPS):
        losses = [_allocation_loss(heads, each) for each in runs]
        update(sum(losses, torch.zeros(())) / len(losses), optimizer, schedule)


def allocation_odds(heads: Heads, layers: Layers) -> Tensor:
    """Return the log-odds of a run's layers at each of its levels: [L, levels]."""
    return heads.layers_say(layers.constants) @ layers.mixes.T + layers.erk


def _allocation_loss(heads: Heads, layers: Layers) -> Tensor:
    odds = allocation_odds(heads, layers)
    each = nn.functional.binary_cross_entropy_with_logits(odds, layers.truth, reduction="none")
    share = layers.sizes.sqrt() / layers.sizes.sqrt().sum()
    return ((each / layers.densities).mean(1) * share).sum()


def _fit_selection(
    heads: Heads,
    train: list[Part],
    held_out: list[Part],
    config: FitConfig,
    on_epoch: Callable[[FitEpoch], None] | None,
) -> list[FitEpoch]:
    optimizer = torch.optim.Adam(heads.selection.parameters(), lr=config.learning_rate)
    parts = [(part, piece) for part in train for piece in _pieces(part, config.batch_size)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * len(parts))
    generator = torch.Generator().manual_seed(config.seed)
    history = []
    for epoch in range(config.epochs):
        for place in torch.randperm(len(parts), generator=generator).tolist():
            part, piece = parts[place]
            loss = _selection_loss(heads, part, piece)
            if not torch.isfinite(loss):
                raise RunFailed(f"the loss of AutoS is not finite in epoch {epoch + 1}")
            update(loss, optimizer, schedule)
        error = measure(heads, train)[0]
        history.append(FitEpoch(epoch + 1, error, *measure(heads, held_out or train)))
        if on_epoch:
            on_epoch(history[-1])
    return history


def _pieces(part: Part, size: int) -> list[Tensor]:
    """Return the rows of each batch: every layer has the same share in all of them."""
    count = len(part[1].layer)
    pieces = max(1, count // size)
    return [torch.arange(start, count, pieces) for start in range(pieces)]


def _selection_loss(heads: Heads, part: Part, rows: Tensor) -> Tensor:
    layers, weights = part
    given = torch.logit(layers.truth, eps=CLOSE)[weights.layer[rows]]
    odds = heads.weights_say(weights.inputs[rows]) @ layers.mixes.T + given
    alive = _alive(weights.survival[rows], len(layers.densities))
    each = nn.functional.binary_cross_entropy_with_logits(odds, alive, reduction="none")
    return (each / layers.densities).mean()


def _alive(survival: Tensor, levels: int) -> Tensor:
    """Return whether each weight is alive at levels 1 to N: [N, levels]."""
    return (survival[:, None] >= torch.arange(1, levels + 1)).float()


def _fraction(part: Part) -> Tensor:
    return part[1].survival.float() / len(part[0].densities)


@torch.no_grad()
def predicted(heads: Heads, part: Part) -> Tensor:
    """Return P(alive) of a run's sampled weights at each of its levels: [N, levels]."""
    layers, weights = part
    odds = allocation_odds(heads, layers)
    return torch.sigmoid(odds[weights.layer] + heads.weights_say(weights.inputs) @ layers.mixes.T)


def measure(heads: Heads, parts: list[Part]) -> tuple[float, float]:
    """Return squared error and rank correlation of expected survival, as a fraction of levels."""
    guess = torch.cat([predicted(heads, part).mean(1) for part in parts])
    target = torch.cat([_fraction(part) for part in parts])
    return errors(guess, target)


def calibration(heads: Heads, parts: list[Part]) -> list[dict[str, float]]:
    """Return, by predicted probability, how many weights were alive: bins even in log-odds."""
    guess = torch.cat([predicted(heads, part).flatten() for part in parts])
    alive = torch.cat(
        [_alive(weights.survival, len(layers.densities)).flatten() for layers, weights in parts]
    )
    place = ((torch.logit(guess, eps=CLOSE) + SPAN) / (2 * SPAN) * BINS).long().clamp(0, BINS - 1)
    rows = []
    for number in place.unique().tolist():
        inside = place == number
        rows.append(
            {
                "predicted": float(guess[inside].mean()),
                "alive": float(alive[inside].mean()),
                "weights": int(inside.count_nonzero()),
            }
        )
    return rows


@torch.no_grad()
def allocation_error(heads: Heads, runs: list[Layers]) -> dict[str, float]:
    """Return the mean |log2(predicted / true density)| of layers, for our head and for ERK."""
    ours, erk = [], []
    for layers in runs:
        odds = allocation_odds(heads, layers)
        truth = layers.truth.clamp(min=1e-4).log2()
        ours.append((torch.sigmoid(odds).log2() - truth).abs().mean())
        erk.append((torch.sigmoid(layers.erk).log2() - truth).abs().mean())
    return {"autos": float(torch.stack(ours).mean()), "erk": float(torch.stack(erk).mean())}
