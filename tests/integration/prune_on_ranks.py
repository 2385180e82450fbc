"""Called on ranks: prune with every criterion; return fingerprints, scores and errors."""

from __future__ import annotations

from typing import Any

import torch

from autosparse import criteria
from autosparse.core.errors import UserError
from autosparse.criteria import pruning
from autosparse.criteria.config import ScoringConfig
from autosparse.criteria.scoring import Selection, score
from autosparse.data import sets
from autosparse.data.config import DataConfig
from autosparse.training.steppers import Ranks
from tests.conftest import make_model

WORLD = 2
DATA = DataConfig(train_limit=300)
FEW = {"rounds": 2, "steps_per_level": 2, "levels": 2, "draws": 1, "steps": 2, "batch_size": 20}
GRADIENT = ("snip", "grasp", "fisher", "iter_snip")
"""Means over samples: what one process finds, in eval mode."""
TRAIN = ScoringConfig(samples_per_class=2)
SCORINGS = {
    "one batch": ScoringConfig(samples_per_class=3, mode="eval"),
    "three batches": ScoringConfig(samples_per_class=1, batches=3, mode="eval"),
    "warm, even": ScoringConfig(samples_per_class=2, batch_size=5, mode="eval", warm_up=True),
    "warm, uneven": ScoringConfig(samples_per_class=1, batch_size=4, mode="eval", warm_up=True),
}
"""In the last one rank gets 4 + 2 images, the other 4."""
CASES = [
    *((name, "one batch") for name in GRADIENT),
    *(("snip", scoring) for scoring in SCORINGS if scoring != "one batch"),
]


def options_of(name: str, scorer: str) -> dict[str, Any]:
    known = criteria.get(name).options
    asked = FEW if name == "autos_irp" else {"scorer": scorer, **FEW}  # It uses the shipped one.
    return {key: value for key, value in asked.items() if key in known}


def scores_of(
    ranks: Ranks | None, name: str, scoring: str
) -> tuple[dict[str, torch.Tensor], float]:
    """Return scores, and the image passes of the card."""
    scored, card = score(
        make_model(), DATA, name, 0.9, selection=Selection(), scoring=SCORINGS[scoring],
        options=options_of(name, ""), ranks=ranks,
    )  # fmt: skip
    return scored.scores, card["image_passes"]


def tickets(ranks: Ranks, scorer: str) -> dict[str, str]:
    found = {}
    for name in criteria.names():
        ticket = pruning.prune(
            make_model(), DATA, name, 0.9, scoring=TRAIN, options=options_of(name, scorer),
            ranks=ranks,
        )  # fmt: skip
        found[name] = ticket.fingerprint
    own = sets.load(DATA).score_batches(2, batches=WORLD)[ranks.rank :: WORLD]
    found["own batches"] = pruning.prune(make_model(), own, "snip", 0.9, ranks=ranks).fingerprint
    return found


def failure(ranks: Ranks, criterion: str, other: str = "test_byobnet") -> str:
    """Return what is said where rank 1 holds a model of another seed (or another kind)."""
    try:
        model = make_model(("test_byobnet", other)[ranks.rank], seed=ranks.rank)
        pruning.prune(model, DATA, criterion, 0.9, scoring=TRAIN, ranks=ranks)
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
