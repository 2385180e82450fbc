"""What a ticket's accuracy rests on: intervals paired by seed, and a verdict in a word."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from scipy import stats

BySeed = Mapping[int, float]
"""Test accuracy by seed."""
CONFIDENCE = 0.95


def paired(first: BySeed, second: BySeed) -> dict[str, Any]:
    """Return mean and interval of first - second, over the seeds that both have.

    The interval is Student's t for paired samples at 95 %; None with fewer than two seeds.
    """
    differences = [first[seed] - second[seed] for seed in first if seed in second]
    if not differences:
        return {"mean": None, "low": None, "high": None, "seeds": 0}
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return {"mean": mean, "low": None, "high": None, "seeds": count}
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    half = float(reach) * statistics.stdev(differences) / count**0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": count}


def verdict(ticket: BySeed, shuffled: BySeed | None, uniform: BySeed | None) -> str:
    """Say in a word what a ticket's accuracy (per seed) rests on.

    `worse`: significantly below its shuffled twin, or below uniform random pruning. Else
    `selection matters`: significantly above its shuffled twin. Else `only allocation`: the shuffled
    twin is significantly above uniform. Else `neither`. Significantly: the paired 95 % interval
    leaves zero out.
    """
    if shuffled is None or uniform is None:
        return "no twins"
    selected, allocated = paired(ticket, shuffled), paired(shuffled, uniform)
    whole = paired(ticket, uniform)
    if any(each["low"] is None for each in (selected, allocated, whole)):
        return "one seed"
    if selected["high"] < 0 or whole["high"] < 0:
        return "worse"
    if selected["low"] > 0:
        return "selection matters"
    if allocated["low"] > 0:
        return "only allocation"
    return "neither"


def beginning(ticket: BySeed, others: Mapping[str, BySeed | None]) -> str:
    """Say whether a topology that moves ends better where it began with this ticket.

    `matters`: significantly more accurate than from every other beginning, by label in `others`;
    `worse than LABEL`: significantly less than from that one; else `no sure difference`. `one seed`
    or `no other beginning` where there is nothing to hold it against.
    """
    against = {label: paired(ticket, each) for label, each in others.items() if each}
    if not against:
        return "no other beginning"
    if any(each["low"] is None for each in against.values()):
        return "one seed"
    worse = [label for label, each in against.items() if each["high"] < 0]
    if worse:
        return f"worse than {', '.join(worse)}"
    return "matters" if all(each["low"] > 0 for each in against.values()) else "no sure difference"
