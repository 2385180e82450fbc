"""Tracking through a spool: in order, again after failures, and kept where it cannot be sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from autosparse.core.files import read_json
from autosparse.integrations import mlflow_spool
from autosparse.integrations.mlflow_spool import Spooled
from autosparse.study.config import SparseTrainConfig
from autosparse.study.trainings import UNSENT
from autosparse.training.steppers import Epoch

CONFIG = SparseTrainConfig()
EPOCH = Epoch(1, 0.5, 0.6, 0.7, 0.01, 2.0)


class Folder:
    """All that a spool asks of a cell."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder


class Flaky:
    """An Observer that fails the first so many times."""

    def __init__(self, failures: int) -> None:
        self.failures, self.heard = failures, []

    def __getattr__(self, name: str) -> Any:
        def called(cell: Folder, *arguments: Any) -> None:
            if self.failures:
                self.failures -= 1
                raise ConnectionError("no server")
            self.heard.append((name, *arguments))

        return called


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_spool, "PAUSES", (0.01,))


def told(spool: Spooled, cell: Any) -> None:
    spool.begin(cell, CONFIG, {})
    spool.epoch(cell, EPOCH)
    spool.end(cell, {"test_accuracy": 0.9})


EVERYTHING = [("begin", CONFIG, {}), ("epoch", EPOCH), ("end", {"test_accuracy": 0.9})]


def test_failures_are_tried_again_in_order_with_one_warning(tmp_path: Path, capsys) -> None:
    observer = Flaky(failures=3)
    spool = Spooled(observer)
    told(spool, Folder(tmp_path))
    spool.close(30)
    assert observer.heard == EVERYTHING
    assert capsys.readouterr().err.count("warning") == 1
    assert not spool.thread.is_alive()
    assert not list(tmp_path.iterdir())


def test_what_mlflow_refuses_is_named_and_not_tried_again(tmp_path: Path, capsys) -> None:
    class Refusing(Flaky):
        def epoch(self, *_: Any) -> None:
            raise MlflowException("the run was deleted", INVALID_PARAMETER_VALUE)

    observer = Refusing(failures=0)
    spool = Spooled(observer)
    told(spool, Folder(tmp_path))
    spool.close(5)
    assert observer.heard == [EVERYTHING[0], EVERYTHING[2]]
    assert f"MLflow refuses epoch of {tmp_path.name}: the run was" in capsys.readouterr().err


def test_what_cannot_be_sent_is_kept_and_sent_the_next_time(tmp_path: Path, capsys) -> None:
    spool = Spooled(Flaky(failures=10**9))
    told(spool, Folder(tmp_path))
    spool.close(0.1)
    assert [method for method, _ in read_json(tmp_path / UNSENT)] == ["epoch", "end"]
    assert UNSENT in capsys.readouterr().err
    killed = Spooled(Flaky(failures=10**9))
    killed.found(Folder(tmp_path), CONFIG)
    assert (tmp_path / UNSENT).is_file(), "until it is sent"
    observer = Flaky(failures=0)
    again = Spooled(observer)
    again.found(Folder(tmp_path), CONFIG)
    again.close(30)
    assert observer.heard == EVERYTHING
    assert not (tmp_path / UNSENT).exists()
