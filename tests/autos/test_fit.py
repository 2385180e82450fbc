"""Fitting AutoS: whole runs held out, seeded, best epoch kept, and it learns what is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

from autosparse.autos import fit
from autosparse.autos.config import FitConfig
from autosparse.core.errors import UsageError
from autosparse.corpus.store import Corpus, IRPRun, read_run, write_run
from autosparse.irp import run as irp
from autosparse.models.gradients import mean_gradients
from tests.conftest import make_model, quick_irp

FIT = FitConfig(epochs=2, rows_per_run=4000, batch_size=500, hidden=[8])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    for seed in range(3):
        irp.run_irp(quick_irp(str(out), seed=seed))
    return out


@pytest.mark.parametrize("kind", ["paper", "context"])
def test_held_out_runs_are_not_trained_on(corpus: Path, kind: str) -> None:
    network = fit.fit(replace(FIT, corpus=str(corpus), features=kind))
    trained, held_out = network.card["trained_on"], network.card["held_out"]
    assert len(trained) == 2
    assert len(held_out) == 1
    assert sorted(trained + held_out) == [folder.name for folder in Corpus(corpus).folders()]
    assert network.card["corpus"] == Corpus(corpus).fingerprint
    assert network.card["rows"] == {"train": 8000, "validation": 4000}


def test_the_best_epoch_by_validation_is_kept(corpus: Path) -> None:
    config = replace(FIT, corpus=str(corpus), epochs=4, learning_rate=0.1)
    network = fit.fit(config)
    best = min(network.card["history"], key=lambda epoch: epoch["validation_mse"])
    run = read_run(corpus / network.card["held_out"][0])
    rows = fit.sample_rows(run, config, network.card["held_out"][0])
    with torch.no_grad():
        error = float((network(rows.inputs) - rows.targets).square().mean())
    assert error == pytest.approx(best["validation_mse"], rel=1e-5)


def test_the_same_seed_gives_the_same_network(corpus: Path) -> None:
    config = replace(FIT, corpus=str(corpus))
    one, two = fit.fit(config), fit.fit(config)
    other = fit.fit(replace(config, seed=1))
    assert one.fingerprint == two.fingerprint != other.fingerprint


def test_it_learns_survival_that_depends_on_the_weight_alone(corpus: Path, tmp_path: Path) -> None:
    """With labels replaced by whether |w| is above its layer's median, it must beat a constant."""
    for folder in Corpus(corpus).folders():
        run = read_run(folder)
        survival = {n: 2 * (w.abs() > w.abs().median()).byte() for n, w in run.initial.items()}
        write_run(tmp_path / folder.name, IRPRun(run.initial, survival, run.rest, run.card))
    config = replace(FIT, corpus=str(tmp_path), epochs=10, hidden=[32])
    card = fit.fit(config).card
    assert card["baseline_mse"] == pytest.approx(0.25, abs=0.01)
    assert card["best"]["validation_mse"] < 0.1
    assert card["best"]["validation_rank_correlation"] > 0.7


def test_gradients_at_init_are_had_again_from_the_card(corpus: Path, digits) -> None:
    folder = Corpus(corpus).folders()[0]
    run = read_run(folder)
    model = make_model(seed=run.card["config"]["seed"])
    batches = digits.score_batches(10, seed=run.card["config"]["seed"])
    weights = {name: model.get_parameter(name) for name in run.initial}
    expected = mean_gradients(model.train(), weights, batches, torch.nn.functional.cross_entropy)
    found = fit.initial_gradients(run)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_rank_correlation_is_spearmans() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randint(0, 5, (200,), generator=generator).float()
    two = one + torch.randn(200, generator=generator)
    pair = torch.stack([fit.ranks(one), fit.ranks(two)])
    assert float(torch.corrcoef(pair)[0, 1]) == pytest.approx(spearmanr(one, two).statistic)


def test_one_run_is_too_few(tmp_path: Path) -> None:
    irp.run_irp(quick_irp(str(tmp_path), levels=1))
    with pytest.raises(UsageError, match="needs two"):
        fit.fit(replace(FIT, corpus=str(tmp_path)))
