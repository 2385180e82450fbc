"""The registry: what is added, how it is promoted, where its links lead."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow.exceptions import MlflowException

from autosparse import compact, prune
from autosparse.autos import features
from autosparse.autos.config import FitConfig
from autosparse.autos.fit import fit
from autosparse.autos.network import AutoS
from autosparse.cli.arguments import guarded
from autosparse.cli.main import _main
from autosparse.core.errors import RunFailed, UsageError
from autosparse.criteria.autos import PRETRAINED
from autosparse.data.sets import DataSource
from autosparse.integrations import promotion, registry
from autosparse.integrations.mlflow import client
from autosparse.integrations.tracking import study_tracker
from autosparse.irp.run import run_irp
from autosparse.models.config import ModelConfig
from autosparse.sparsity.ticket import Ticket
from autosparse.study import local, plan, table
from autosparse.study.config import SweepConfig
from tests.conftest import QUICK, SMALL_DIGITS, few, make_model, quick_irp

NAME = "test_byobnet-sparse"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("registry")
    before = os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    yield folder
    del os.environ["MLFLOW_TRACKING_URI"]
    if before:
        os.environ["MLFLOW_TRACKING_URI"] = before


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Path:
    for seed in (0, 1):
        run_irp(quick_irp(str(folder / "corpus"), seed=seed))
    settings = FitConfig(str(folder / "corpus"), hidden=[4], rows_per_run=500, epochs=1)
    path = folder / "autos.safetensors"
    fit(settings).save(path)
    return path


def swept(folder: Path, out: str, digits: DataSource, **changes) -> SweepConfig:
    """Train a sweep's cells in this process, and track them as the driver does."""
    settings = SweepConfig(
        models=[ModelConfig("test_byobnet")], data=SMALL_DIGITS, criteria=["autos"], seeds=[0],
        options={"autos": {"scorer": str(folder / "autos.safetensors")}},
        sparsities=[0.5, 0.8], training=QUICK, out=str(folder / out),
    )  # fmt: skip
    settings = replace(settings, **changes)
    cells = plan.cells(settings)
    with study_tracker(settings, folder / out) as tracker:
        for cell in cells:
            local.run_cell(cell, digits)
            tracker.end(cell)
    table.write_report(settings, table.table(cells), cells)
    return settings


@pytest.fixture(scope="module")
def added(folder: Path, scorer: Path, digits: DataSource) -> list[dict]:
    rows = registry.add(scorer)
    swept(folder, "first", digits)
    return rows + registry.add(folder / "first")


def version(number: int):
    return registry.MlflowClient().get_model_version(NAME, str(number))


def test_the_best_of_every_sparsity_is_registered_once(added: list[dict], folder: Path):
    assert [(row["model"], row["version"], row["aliases"]) for row in added] == [
        ("autos", 1, "champion"),
        (NAME, 1, "sparsity-50"),
        (NAME, 2, "champion, sparsity-80"),
    ]
    again = registry.add(folder / "first")
    assert [row["version"] for row in again] == [1, 2]
    assert registry.add(folder / "autos.safetensors")[0]["version"] == 1
    assert len(registry.listing()) == 3


def test_links_lead_to_what_a_checkpoint_came_from(added: list[dict]):
    found = version(2)
    links = dict(re.findall(r"\[([^]]+)\]\((#[^)]+)\)", found.description))
    known, experiment = client()
    runs = {
        f"#/experiments/{experiment}/runs/{run.info.run_id}": run
        for run in known.search_runs([experiment])
    }
    trained = runs[links["autos-80-seed0"]]
    assert trained.info.run_id == found.run_id
    assert links["sweep first"] in runs
    assert links["autos version 1"] == "#/models/autos/versions/1"
    assert trained.data.tags["autos"] == found.tags["autos"]
    assert f"{float(found.tags['test_accuracy']):.2%}" in found.description


def test_an_autos_with_two_heads_is_registered_and_says_the_same(added: list[dict]):
    network = AutoS.load(PRETRAINED)
    made = registry.add(PRETRAINED)[0]["version"]
    assert list(PRETRAINED.parent.iterdir()) == [PRETRAINED], "nothing is written beside the file"
    version = registry.MlflowClient().get_model_version("autos", str(made))
    assert version.tags["head"] == "survival"
    assert "alive at 60, 37, 23" in version.description
    inputs = torch.randn(5, len(features.names_of("context")))
    loaded = mlflow.pytorch.load_model(f"models:/autos/{made}")
    expected = network.heads.selection(network.heads.normalised(inputs))
    assert expected.shape == (5, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(inputs), expected)


@pytest.mark.slow
def test_the_champion_has_the_recorded_accuracy_in_a_fresh_process(
    added: list[dict], digits: DataSource, tmp_path: Path
):
    images = digits.prepare(digits.test.images)
    torch.save((images, digits.test.labels), tmp_path / "test.pt")
    program = (
        "import sys, mlflow, torch\n"
        f"model = mlflow.pytorch.load_model('models:/{NAME}@champion')\n"
        "images, labels = torch.load(sys.argv[1])\n"
        "print((model(images).argmax(1) == labels).float().mean().item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "test.pt")],
        env={**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    reached = float(done.stdout.strip().splitlines()[-1])
    assert reached == pytest.approx(float(version(2).tags["test_accuracy"]), abs=1e-5)


def test_the_models_page_leads_to_every_alias(added: list[dict]):
    text = registry.MlflowClient().get_registered_model(NAME).description
    accuracy = 100 * float(version(2).tags["test_accuracy"])
    assert (
        f"| `@champion` | [version 2](#/models/{NAME}/versions/2) | 80 % | autos | "
        f"{accuracy:.4g} % | digits |"
    ) in text
    assert "`@sparsity-50`" in text


def challenger(folder: Path, accuracy: str, **tags: str) -> int:
    """A version that claims what it is told to, made from the champion's files."""
    found = registry.MlflowClient()
    champion = version(2)
    claims = {**champion.tags, "test_accuracy": accuracy, "fingerprint": accuracy, **tags}
    return int(found.create_model_version(NAME, champion.source, tags=claims).version)


def test_only_a_better_version_of_the_same_kind_is_promoted(added: list[dict], folder: Path):
    worse = challenger(folder, "0.01")
    with pytest.raises(RunFailed, match="not better than the champion, version 2"):
        promotion.promote(NAME, worse)
    other = challenger(folder, "0.98", sparsity="0.5")
    with pytest.raises(UsageError, match="their sparsity differs"):
        promotion.promote(NAME, other)
    elsewhere = challenger(folder, "0.97", test_fingerprint="other")
    with pytest.raises(UsageError, match="their test data differs"):
        promotion.promote(NAME, elsewhere)
    with pytest.raises(UsageError, match="has no speed"):
        promotion.promote(NAME, worse, metric="speed")
    assert promotion.alias_of(NAME, "champion") == 2
    better = challenger(folder, "0.99")
    promotion.set_alias(NAME, "challenger", better)
    assert "0.99 against" in promotion.promote(NAME, better)
    assert promotion.alias_of(NAME, "champion") == better
    assert promotion.alias_of(NAME, "challenger") is None
    assert promotion.alias_of(NAME, "former-champion") == 2
    assert "forced" in promotion.promote(NAME, worse, force=True)
    assert promotion.alias_of(NAME, "champion") == worse
    promotion.promote(NAME, 2, force=True)


def with_metric(name: str, value: float, folder: Path, **tags: str) -> int:
    """A version of the champion's kind, of a run in which something else was measured."""
    found, experiment = client()
    run = found.create_run(experiment).info.run_id
    found.log_metric(run, name, value)
    champion = version(2)
    claims = {**champion.tags, "fingerprint": f"{name} {value}", **tags}
    made = found.create_model_version(NAME, champion.source, run_id=run, tags=claims)
    return int(made.version)


@pytest.mark.parametrize(
    "metric",
    few(
        ["validation_loss", "train_loss", "final/test_loss", "seconds", "final/checkpoint_bytes"],
        ["validation_loss", "final/checkpoint_bytes"],
    ),
)
def test_of_losses_and_costs_the_lower_is_better(added: list[dict], folder: Path, metric: str):
    name = metric.removeprefix("final/")
    champion, worse, better = (with_metric(metric, each, folder) for each in (0.5, 0.7, 0.3))
    promotion.promote(NAME, champion, force=True)
    try:
        with pytest.raises(RunFailed, match=f"{name} 0.7 against 0.5 .lower is better"):
            promotion.promote(NAME, worse, name)
        assert "0.3 against 0.5" in promotion.promote(NAME, better, name)
    finally:
        promotion.promote(NAME, 2, force=True)


def test_which_is_better_is_asked_where_it_is_not_known(added: list[dict], folder: Path):
    champion, other = (with_metric("latency", each, folder) for each in (5.0, 4.0))
    promotion.promote(NAME, champion, force=True)
    try:
        with pytest.raises(UsageError, match="is lower or higher latency better"):
            promotion.promote(NAME, other, "latency")
        with pytest.raises(UsageError, match="unknown --better 'less'"):
            promotion.promote(NAME, other, "latency", better="less")
        with pytest.raises(RunFailed, match="higher is better"):
            promotion.promote(NAME, other, "latency", better="higher")
        assert "4 against 5" in promotion.promote(NAME, other, "latency", better="lower")
    finally:
        promotion.promote(NAME, 2, force=True)


def test_versions_are_compared_on_the_images_that_they_were_measured_on(
    added: list[dict], folder: Path
):
    assert version(2).tags["test_fingerprint"] != version(2).tags["data_fingerprint"]
    more = challenger(folder, "0.995", data_fingerprint="more training images")
    with pytest.raises(UsageError, match="their data differs"):
        promotion.promote(NAME, more, "validation_accuracy")
    unknown = challenger(folder, "0.996", test_fingerprint="", data="folder")
    with pytest.raises(UsageError, match="their test data differs"):
        promotion.promote(NAME, unknown)
    assert "0.995 against" in promotion.promote(NAME, more)
    promotion.promote(NAME, 2, force=True)


def test_autos_models_are_compared_on_the_same_held_out_runs(added: list[dict]):
    found, first = registry.MlflowClient(), registry.MlflowClient().get_model_version("autos", "1")
    tags = {**first.tags, "validation_mse": "0.0001", "fingerprint": "x", "held_out": "others"}
    other = int(found.create_model_version("autos", first.source, tags=tags).version)
    with pytest.raises(UsageError, match="their choice of held-out runs differs"):
        promotion.promote("autos", other)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["lst"], "unknown command of autosparse registry 'lst'"),
        (["promote", NAME], "needs --version N"),
        (["promote", "nobody", "--version", "1"], "unknown registered model 'nobody'"),
        (["promote", NAME, "--version", "99"], "no version 99"),
        (["promote", NAME, "--version", "x"], "--version is a whole number, got 'x'"),
        (["promote", NAME, "--versoin", "1"], "'versoin'"),
        (["add", "nowhere"], "no such file"),
    ],
)
def test_mistakes_are_one_line(added: list[dict], arguments, named, capsys):
    assert guarded(_main, ["registry", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


def test_tickets_of_the_same_masks_are_fetched_each_by_itself(
    added: list[dict], folder: Path, tmp_path: Path, monkeypatch
):
    """A database that was made anew counts versions from one again."""
    monkeypatch.setattr(registry, "CACHE", tmp_path)
    fetched = []
    for content in ("one", "another"):
        registry.MlflowClient().set_model_version_tag(NAME, "1", "fingerprint", content)
        fetched.append(registry.fetch_ticket(f"models:/{NAME}/1"))
    assert fetched[0] != fetched[1]
    kept = Ticket.load(fetched[0])
    registry.MlflowClient().set_model_version_tag(NAME, "1", "fingerprint", kept.content_hash)


def test_a_version_with_standardised_kernels_says_what_was_measured(
    added: list[dict], digits: DataSource, tmp_path: Path
):
    ticket = prune(make_model("test_nfnet"), digits, "magnitude", 0.9)
    ticket.save(tmp_path / "ticket.safetensors")
    result = {
        "sparsity": 0.9, "criterion": "magnitude", "test_accuracy": 0.5, "seed": 0,
        "validation_accuracy": 0.5, "parameters": 1, "checkpoint_bytes": 1,
    }  # fmt: skip
    made = registry.register_ticket(tmp_path / "ticket.safetensors", result, version(2).run_id)
    images = digits.prepare(digits.test.images[:5])
    loaded = mlflow.pytorch.load_model(f"models:/test_nfnet-sparse/{made}")
    with torch.no_grad():
        expected = compact(make_model("test_nfnet"), ticket).eval()(images)
        torch.testing.assert_close(loaded(images), expected, rtol=1e-4, atol=1e-5)


def test_a_server_that_fails_does_not_make_a_champion(added: list[dict], monkeypatch):
    def fails(*_):
        raise MlflowException("try again later")

    with monkeypatch.context() as patch:
        patch.setattr(registry.MlflowClient, "get_model_version_by_alias", fails)
        promotion.contend(NAME, 1)
        patch.setattr(registry.MlflowClient, "get_registered_model", fails)
        with pytest.raises(MlflowException, match="try again later"):
            promotion.alias_of(NAME, promotion.CHAMPION)
    registry.MlflowClient().delete_registered_model_alias(NAME, promotion.CHALLENGER)
    assert promotion.alias_of(NAME, promotion.CHAMPION) == 2
