"""Called on two ranks: what fails on one of them only, and what each is told of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autosparse import prune
from autosparse.core.errors import RunFailed, UsageError
from autosparse.core.files import write_json
from autosparse.core.locks import Claim
from autosparse.data import sets
from autosparse.integrations import deepspeed, deepspeed_ranks, launched
from autosparse.study import trainings
from autosparse.study.cells import RESULT, cells
from autosparse.study.config import SparseTrainConfig, StudyConfig
from autosparse.training.loop import fit
from autosparse.training.steppers import Ranks
from tests.conftest import QUICK, SMALL_DIGITS, make_model


class Lossy(nn.Module):
    """A Stepper and its model; rank 1's loss of the last step of three is not finite."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.layer, self.model = nn.Linear(1, 1), nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
        self.ranks, self.updates, self.seed, self.scheduler = ranks, 0, 0, None

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        self.updates += 1
        spoilt = self.updates == 3 and self.ranks.rank == 1
        return torch.tensor(float("inf") if spoilt else 2.0)

    def evaluated(self) -> nn.Module:
        return self.model

    def learning_rate(self) -> float:
        return 0.0


def lossy(ranks: Ranks) -> str:
    """Return the error where only one rank's loss is not finite."""
    with pytest.raises(RunFailed) as failed:
        fit(Lossy(ranks), sets.load(SMALL_DIGITS), QUICK, seed=0)  # type: ignore[arg-type]
    return str(failed.value)


def asked(ranks: Ranks) -> list[str]:
    """Return the errors where rank 0 is asked, and where each does something for itself."""

    def fail() -> None:
        raise OSError("no space left")

    found = []
    for ask in (ranks.first_says, lambda make: ranks.together(make if ranks.rank else int)):
        with pytest.raises((OSError, RunFailed)) as failed:
            ask(fail)
        found.append(f"{type(failed.value).__name__}: {failed.value}")
    return found


@contextmanager
def own_signals() -> Iterator[None]:
    """Put back the handlers that a training sets."""
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def studied(ranks: Ranks, config: StudyConfig) -> None:
    """Train a study's cells as the ranks do that its executor has launched."""
    with pytest.MonkeyPatch.context() as patch, own_signals():
        patch.setattr(deepspeed_ranks, "start", lambda: (ranks, "cpu"))
        launched.train(config)


def failing(ranks: Ranks, out: Path, where: str) -> str:
    """Return the error of a training in which something fails on one rank."""
    path = out / "ticket.safetensors"
    if ranks.rank == 0 and not path.is_file():
        prune(make_model(), sets.load(SMALL_DIGITS), "erk", 0.9).save(path)
    torch.distributed.barrier()
    config = SparseTrainConfig(tickets=str(path), training=QUICK, out=str(out / where))

    def fail(*_: Any, **__: Any) -> None:
        raise (UsageError if where == "load" else RunFailed)(f"no {where}")

    with pytest.MonkeyPatch.context() as patch, own_signals():
        patch.setattr(deepspeed, "start", lambda: (ranks, "cpu"))
        if where == "there":
            (cell,) = cells(config)
            if ranks.rank == 0:
                write_json(cell.folder / RESULT, {"name": cell.name})
            patch.setattr(sets, "if_there", fail)
        elif where == "load" and ranks.rank == 1:
            patch.setattr(sets, "load", fail)
        elif where == "claim":
            patch.setattr(Claim, "check", fail)
        elif where == "disk":
            patch.setattr(trainings, "_finish", fail)
        with pytest.raises((UsageError, RunFailed)) as failed:
            deepspeed.train(config)
    return f"{type(failed.value).__name__}: {failed.value}"
