"""The figures of a corpus, drawn from its runs alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from autosparse.autos.fit import initial_gradients
from autosparse.core.errors import UsageError
from autosparse.core.files import is_local, read_card
from autosparse.corpus.store import REPORT, RUN, Corpus, IRPRun, data_name
from autosparse.report.corpus_figures import layer_densities, level_curves, survival_map

logger = logging.getLogger(__name__)


def write_report(
    path: str | Path, out: Path | None = None, on_run: Callable[[], None] | None = None
) -> list[Path]:
    """Draw level curves, survival over weight and gradient, and every model's layer densities.

    Args:
        path: the corpus.
        out: folder for the figures; by default `report` in the corpus, or for a corpus that is
            not local, a folder of that name here.
        on_run: called after each run that was read.

    Returns the PNGs; the data are in a CSV beside each. The survival map takes the gradients at
    init, so the data that the runs were made on; where they are not there it is left out, and a
    warning says so.
    """
    corpus = Corpus(path)
    name = corpus.path.name
    out = out or (corpus.path / REPORT if is_local(corpus.path) else Path(f"{name}-{REPORT}"))
    folders = corpus.folders()
    cards = [read_card(folder / RUN) for folder in folders]
    rows = [row for card in cards for row in level_rows(card)]
    figures = [level_curves(rows, out / "levels.png", f"IRP runs of {name}")]
    shown: set[tuple[Any, ...]] = set()

    def runs() -> Iterator[tuple[IRPRun, dict[str, Tensor]]]:
        for folder in folders:
            run = corpus.read(folder.name)
            gradients = initial_gradients(run)
            yield run, gradients
            if on_run:
                on_run()

    for folder, card in zip(folders, cards, strict=True):
        config = card["config"]
        data = data_name(config["data"])
        kind = (str(config["model"]), data, config["label"], config["scope"])
        if kind not in shown:
            shown.add(kind)
            title = f"{config['model']['name']} on {data}, {config['label']}"
            run = corpus.read(folder.name)
            figures.append(layer_densities(run, out / f"layers-{folder.name}.png", title))
    try:
        figures.append(survival_map(runs(), out / "survival.png", f"Survival in {name}"))
    except UsageError as error:
        logger.warning("the survival map is left out: %s", error)
    return figures


def level_rows(card: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row per level of a run: what `level_curves` takes."""
    config = card["config"]
    return [
        {
            "run_id": card["run_id"],
            "model": config["model"]["name"],
            "data": data_name(config["data"]),
            "seed": config["seed"],
            "label": config["label"],
            "level": level["level"],
            "density": level["density"],
            "accuracy": level["validation_accuracy"],
        }
        for level in card["levels"]
    ]
