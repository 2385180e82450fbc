"""Freed blocks stay: the pages of a step's tensors are not asked of the system again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from autosparse.core.memory import keep_freed_blocks

def counted():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def faults():
    found = []
    for turn in range(24):  # glibc takes up to seven blocks before it comes back to the first.
        before = counted()
        block = torch.ones(1 << 24)  # 64 MiB: more than glibc ever learns to keep by itself.
        del block
        found.append(counted() - before)
    return sorted(found[-8:])[4]

print(faults())
keep_freed_blocks()
print(faults())
"""


def faults(**environment: str) -> list[int]:
    """Return the page faults of a tensor in a new process, as it starts and when told to keep."""
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment or None
    )
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_what_is_freed_is_used_again() -> None:
    pages = (64 << 20) // 4096
    left, kept = faults()
    assert left > pages / 2
    assert kept < pages / 100


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_what_the_environment_says_counts() -> None:
    assert faults(MALLOC_MMAP_THRESHOLD_="131072")[1] > 1000
