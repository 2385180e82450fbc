"""Growing a corpus with a local Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from autosparse.corpus.store import Corpus
from autosparse.data.config import DataConfig
from autosparse.integrations import ray as growing
from autosparse.irp.config import CorpusConfig
from autosparse.models.config import ModelConfig
from tests.conftest import QUICK, SMALL_DIGITS

PLAN = CorpusConfig(
    models=[ModelConfig("test_byobnet"), ModelConfig("test_resnet")],
    data=[SMALL_DIGITS],
    training=QUICK,
    levels=2,
    final_density=0.1,
)


@pytest.fixture(scope="module")
def grown(local_ray, tmp_path_factory: pytest.TempPathFactory) -> growing.Grown:
    out = tmp_path_factory.mktemp("corpus")
    return growing.grow(_plan(out))


def _plan(out: Path, **changes) -> CorpusConfig:
    return CorpusConfig(**{**vars(PLAN), "out": str(out), **changes})


def test_every_run_of_the_plan_is_done_and_indexed(grown: growing.Grown) -> None:
    assert len(grown.done) == 2
    assert not grown.failed
    rows = Corpus(grown.folder).table()
    assert sorted(row["model"] for row in rows) == ["test_byobnet", "test_resnet"]
    assert (grown.folder / "index.parquet").is_file()


def test_finished_runs_are_found_and_only_new_ones_done(grown: growing.Grown) -> None:
    before = {path: path.stat().st_mtime_ns for path in grown.folder.glob("*/run.safetensors")}
    again = growing.grow(_plan(grown.folder))
    assert (len(again.found), again.done) == (2, [])
    more = growing.grow(_plan(grown.folder, seeds=[0, 1], models=[ModelConfig("test_byobnet")]))
    assert (len(more.found), len(more.done)) == (1, 1)
    for path, changed in before.items():
        assert path.stat().st_mtime_ns == changed


def test_a_run_that_fails_is_named_and_does_not_stop_the_others(local_ray, tmp_path: Path) -> None:
    models = [ModelConfig("test_byobnet"), ModelConfig("test_byobnet", {"no_such_option": 1})]
    grown = growing.grow(_plan(tmp_path, models=models))
    assert len(grown.done) == 1
    ((name, error),) = grown.failed.items()
    assert "no_such_option" in error
    assert (tmp_path / name / "failed.json").is_file()
    assert len(Corpus(tmp_path).folders()) == 1
    with pytest.raises(growing.RunFailed, match=name):
        growing.raise_if_failed(grown)


def test_a_plan_with_a_mistake_starts_nothing(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="magnitude"):
        growing.grow(_plan(tmp_path, labels=["magnitud"]))
    assert not any(tmp_path.iterdir())


def test_outside_a_job_relative_folders_are_relative_to_here(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert growing.output_folder("corpus") == tmp_path / "corpus"
    monkeypatch.setenv(growing.JOB_VARIABLE, "{}")
    monkeypatch.setenv(growing.HOME_VARIABLE, str(tmp_path / "home"))
    assert growing.output_folder("corpus") == tmp_path / "home" / "corpus"
    assert growing.output_folder(str(tmp_path)) == tmp_path


def test_the_plan_is_the_product_of_its_lists() -> None:
    plan = CorpusConfig(
        models=[ModelConfig("a"), ModelConfig("b")],
        data=[DataConfig(), DataConfig(train_limit=5)],
        seeds=[0, 1, 2],
        labels=["magnitude", "snip"],
    ).runs()
    assert len(plan) == 2 * 2 * 3 * 2
    keys = {(r.model.name, r.data.train_limit, r.seed, r.label) for r in plan}
    assert len(keys) == len(plan)
