"""Fitting the two heads: what layers keep and which weights, from a corpus that says it plainly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autosparse.autos import fit, fit_heads
from autosparse.autos.config import FitConfig
from autosparse.autos.network import AutoS
from autosparse.core.errors import UsageError
from autosparse.corpus.store import Corpus, IRPRun, read_run, write_run
from autosparse.irp import run as irp
from tests.conftest import quick_irp

FIT = FitConfig(head="survival", epochs=8, rows_per_run=3000, batch_size=500, hidden=[8])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs whose labels are replaced: the largest half, then quarter, of every layer."""
    grown, out = tmp_path_factory.mktemp("grown"), tmp_path_factory.mktemp("corpus")
    for seed in range(2):
        irp.run_irp(quick_irp(str(grown), seed=seed, levels=2))
    for folder in Corpus(grown).folders():
        run = read_run(folder)
        survival = {}
        for name, weight in run.initial.items():
            place = weight.abs().flatten().argsort(descending=True).argsort() / weight.numel()
            levels = (place < 0.5).byte() + (place < 0.25).byte()
            survival[name] = levels.view(weight.shape)
        write_run(out / folder.name, IRPRun(run.initial, survival, run.rest, run.card))
    return out


def test_it_learns_what_layers_keep_and_which_weights(corpus: Path) -> None:
    card = fit_heads.fit(replace(FIT, corpus=str(corpus), learning_rate=0.03)).card
    assert len(card["trained_on"]) == len(card["held_out"]) == 1
    assert card["allocation_error"]["autos"] < 0.5 * card["allocation_error"]["erk"]
    assert card["best"]["validation_mse"] < 0.3 * card["baseline_mse"]
    assert card["best"]["validation_rank_correlation"] > 0.8
    assert sum(each["weights"] for each in card["calibration"]) == 2 * card["rows"]["validation"]


def test_the_same_corpus_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    config = replace(FIT, corpus=str(corpus), epochs=1, holdout=0.0)
    for name in ("one", "two"):
        fit_heads.fit(config).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded = AutoS.load(tmp_path / "one")
    assert loaded.head == "survival"
    assert loaded.card["held_out"] == []


def test_runs_are_left_out_by_pattern(corpus: Path) -> None:
    ids = [folder.name for folder in Corpus(corpus).folders()]
    config = replace(FIT, corpus=str(corpus), holdout=0.0)
    assert fit.split_runs(Corpus(corpus), config) == (ids, [])
    one = replace(config, exclude=[{"seed": 1, "label": "mag*"}])
    assert len(fit.split_runs(Corpus(corpus), one)[0]) == 1
    with pytest.raises(UsageError, match="matches no run"):
        fit.split_runs(Corpus(corpus), replace(config, exclude=[{"seed": 7}]))
    with pytest.raises(UsageError, match="label"):
        fit.split_runs(Corpus(corpus), replace(config, exclude=[{"labl": "x"}]))


def test_calibration_by_hand() -> None:
    # A head that says nothing, in one layer whose ERK log-odds are 0: P = 1/2 at the one level.
    network = AutoS("context", [3], head="survival")
    for parameter in network.heads.selection.parameters():
        torch.nn.init.zeros_(parameter)
    layers = fit_heads.Layers(
        torch.zeros(1, 7), torch.zeros(1, 1), torch.tensor([[0.25]]), torch.tensor([4.0]),
        torch.eye(8)[:1], torch.tensor([0.25]),
    )  # fmt: skip
    weights = fit_heads.Weights(
        torch.zeros(4, 14), torch.tensor([0, 1, 0, 0]), torch.zeros(4, dtype=torch.long)
    )
    found = fit_heads.calibration(network.heads, [(layers, weights)])
    assert found == [{"predicted": 0.5, "alive": 0.25, "weights": 4}]
    # log2(1/2) is one above log2(1/4), for both.
    errors = fit_heads.allocation_error(network.heads, [layers])
    assert errors == {"autos": pytest.approx(1.0), "erk": pytest.approx(1.0)}
