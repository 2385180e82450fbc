"""Verdicts and their intervals, by hand."""

from __future__ import annotations

import pytest

from autosparse.study.verdicts import beginning, paired, verdict


def by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def test_the_interval_is_students():
    found = paired(by_seed(0.5, 0.7, 0.9), by_seed(0.4, 0.5, 0.6))
    # Differences 0.1, 0.2, 0.3: mean 0.2, sd 0.1; t(0.975, 2) = 4.303; half 0.2484.
    assert found["mean"] == pytest.approx(0.2)
    assert found["low"] == pytest.approx(0.2 - 0.24841, abs=1e-5)
    assert found["high"] == pytest.approx(0.2 + 0.24841, abs=1e-5)


def test_pairing_takes_out_what_seeds_have_in_common():
    hard, easy = by_seed(0.2, 0.5, 0.8), by_seed(0.25, 0.551, 0.849)
    assert paired(easy, hard)["low"] > 0
    assert paired(by_seed(0.849, 0.25, 0.551), hard)["low"] < 0


def test_seeds_that_only_one_has_do_not_count():
    assert paired({0: 0.5, 1: 0.6, 7: 0.0}, {0: 0.4, 1: 0.5, 8: 1.0})["seeds"] == 2


@pytest.mark.parametrize(
    ("ticket", "shuffled", "uniform", "expected"),
    [
        ((0.80, 0.81, 0.82), (0.70, 0.71, 0.72), (0.50, 0.52, 0.51), "selection matters"),
        ((0.70, 0.72, 0.71), (0.71, 0.70, 0.72), (0.50, 0.52, 0.51), "only allocation"),
        ((0.70, 0.72, 0.71), (0.71, 0.70, 0.72), (0.60, 0.80, 0.70), "neither"),
        ((0.60, 0.61, 0.62), (0.70, 0.71, 0.72), (0.50, 0.52, 0.51), "worse"),
        ((0.10, 0.11, 0.10), (0.10, 0.10, 0.11), (0.50, 0.52, 0.51), "worse"),
        ((0.80,), (0.70,), (0.50,), "one seed"),
    ],
)
def test_verdicts(ticket, shuffled, uniform, expected):
    assert verdict(by_seed(*ticket), by_seed(*shuffled), by_seed(*uniform)) == expected


def test_without_twins_there_is_no_verdict():
    assert verdict(by_seed(0.8, 0.9), None, by_seed(0.5, 0.5)) == "no twins"


def test_whether_a_beginning_matters() -> None:
    """Differences of 0.1 ± 0.01 over three seeds are sure, of 0.01 ± 0.1 are not."""
    own = {0: 0.60, 1: 0.61, 2: 0.62}
    low = {0: 0.50, 1: 0.52, 2: 0.51}
    near = {0: 0.70, 1: 0.50, 2: 0.60}
    assert beginning(own, {"erk": low, "uniform": low}) == "matters"
    assert beginning(own, {"erk": near, "uniform": low}) == "no sure difference"
    assert beginning(low, {"erk": near, "uniform": own}) == "worse than uniform"
    assert beginning(own, {"erk": None, "uniform": None}) == "no other beginning"
    assert beginning({0: 0.6}, {"erk": {0: 0.5}}) == "one seed"
