"""What fails on one of two ranks is told on both, before the other waits for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.failures_on_ranks import asked, failing, lossy
from tests.integration.ranks import Group

SOON = 20
"""Seconds: a rank that waits for one that has raised would wait for minutes."""


def test_a_loss_of_one_rank_that_is_not_finite_is_told_on_both(group: Group) -> None:
    for said in group.call(lossy, seconds=SOON):
        assert said.startswith("the loss is inf at step 3 (epoch 1); lower")


def test_an_error_that_is_no_users_is_told_on_both(group: Group) -> None:
    first, second = group.call(asked, seconds=SOON)
    assert first == ["OSError: no space left", "RunFailed: rank 1 failed: OSError: no space left"]
    assert second == ["RunFailed: rank 0 failed: OSError: no space left", "OSError: no space left"]


@pytest.mark.parametrize("where", ["there", "load", "claim", "disk"])
def test_what_fails_on_one_rank_in_a_training_is_told_on_both(
    group: Group, tmp_path: Path, where: str
) -> None:
    error = "UsageError" if where == "load" else "RunFailed"
    assert group.call(failing, tmp_path, where, seconds=SOON) == [f"{error}: no {where}"] * 2
