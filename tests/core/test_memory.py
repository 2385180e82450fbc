"""Freed blocks stay: the pages of a step's tensors are not asked of the system again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from autosparse.core.memory import keep_freed_blocks

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep":
    keep_freed_blocks()
found = []
for turn in range(24):  # glibc takes up to seven blocks before it comes back to the first.
    before = faults()
    block = torch.ones(1 << 24)  # 64 MiB: more than glibc ever learns to keep by itself.
    del block
    found.append(faults() - before)
print(sorted(found[-8:])[4])
"""


def faults(how: str, **environment: str) -> int:
    command = [sys.executable, "-c", FAULTS, how]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment or None
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_what_is_freed_is_used_again() -> None:
    pages = (64 << 20) // 4096
    assert faults("leave") > pages / 2
    assert faults("keep") < pages / 100


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_what_the_environment_says_counts() -> None:
    assert faults("keep", MALLOC_MMAP_THRESHOLD_="131072") > 1000
