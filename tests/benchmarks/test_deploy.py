"""The deploy benchmark goes on where it was stopped, and ends in time."""

from __future__ import annotations

from pathlib import Path

from benchmarks.deploy import Parts


def test_a_part_is_measured_once_and_none_begins_after_the_time(tmp_path: Path) -> None:
    measured: list[str] = []

    def measure() -> dict:
        measured.append("it")
        return {"seconds": 3}

    first = Parts(tmp_path, minutes=5)
    assert first.get("slim", [32], measure) == {"seconds": 3}
    late = Parts(tmp_path, minutes=0)
    assert late.get("slim", [32], measure) == {"seconds": 3}
    assert late.get("slim", [64], measure) is None  # Other settings make another part.
    assert (measured, first.left, late.left) == (["it"], [], ["slim"])
