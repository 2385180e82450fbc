"""AutoS: scores from a network that has learned which weights survive iterative pruning.

Paper: S. Liu, Y. Cheng et al., Learning effective pruning at initialization from iterative
pruning, arXiv 2408.14757: a network maps the initial weight and its initial gradient to the
survival that iterative rewind pruning would give it; the lowest scores are pruned.

Departures: with `features: context` the network sees more than those two (see features.py), and
it is a small MLP, not a ResNet-18.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from autosparse.criteria import Scores, register
from autosparse.errors import UsageError
from autosparse.gradients import mean_gradients
from autosparse.scorer import AutoS

PRETRAINED = Path(__file__).parent.parent / "pretrained" / "autos.safetensors"


def fingerprints(scorer: str | None = None, **_) -> dict[str, str]:
    """Return the fingerprints of the AutoS file and of the corpus that it was fitted on."""
    network = _found(scorer)
    return {"autos": network.fingerprint, "corpus": network.card.get("corpus", "unknown")}


@register("autos", needs_data=True, provenance=fingerprints)
def autos(model, parameters, batches, loss_fn, *, scorer: str | None = None) -> Scores:
    """Return predicted survival.

    Args:
        scorer: an AutoS file; by default the environment's AUTOSPARSE_SCORER, then the one that
            comes with the package.
    """
    network = _found(scorer)
    gradients = mean_gradients(model, parameters, batches, loss_fn)
    return network.to(next(iter(parameters.values())).device).score(parameters, gradients)


def _found(scorer: str | None) -> AutoS:
    path = Path(scorer or os.environ.get("AUTOSPARSE_SCORER") or PRETRAINED)
    if not path.is_file():
        raise UsageError(
            f"no AutoS file at {path}; fit one with `autosparse fit` and name it in options.scorer"
        )
    return _loaded(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _loaded(path: Path, changed: int) -> AutoS:
    return AutoS.load(path)
