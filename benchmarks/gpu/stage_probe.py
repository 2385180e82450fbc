"""What the machine is, and its two ceilings: bytes and operations per second."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autosparse.core.versions import environment
from benchmarks.gpu.measure import Recorder, Setting, in_turn

BYTES, TINY_BYTES = 1 << 32, 1 << 20
SIDE, TINY_SIDE = 8192, 128
HOST_BYTES = 1 << 28


def run(setting: Setting, recorder: Recorder) -> None:
    recorder.note("environment", environment())
    recorder.note("gpu", described())
    shared = os.statvfs("/dev/shm")
    recorder.note("dev_shm_bytes", shared.f_bavail * shared.f_frsize)
    copy_on_device(setting, recorder)
    multiply(setting, recorder)
    from_host(setting, recorder)


def copy_on_device(setting: Setting, recorder: Recorder) -> None:
    """Measure a copy from device memory to device memory."""
    size = TINY_BYTES if setting.tiny else BYTES
    source = torch.empty(size, dtype=torch.uint8, device=setting.device).random_()
    target = torch.empty_like(source)
    found = in_turn({"copy": lambda: target.copy_(source)}, setting, steps=3)["copy"]
    recorder.add("copy_gb_per_s", [2 * size / 1e6 / each for each in found])


def described() -> str:
    """Return what nvidia-smi says of the GPU and its driver."""
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    asked = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def multiply(setting: Setting, recorder: Recorder) -> None:
    """Measure a large product of random matrices in bf16."""
    side = TINY_SIDE if setting.tiny else SIDE
    one, two = (
        torch.randn(side, side, device=setting.device, dtype=torch.bfloat16) for _ in range(2)
    )
    found = in_turn({"product": lambda: one @ two}, setting, steps=10)["product"]
    recorder.add("bf16_tflop_per_s", [2 * side**3 / 1e9 / each for each in found])


def from_host(setting: Setting, recorder: Recorder) -> None:
    """Measure copies to the device, from pinned and from ordinary memory."""
    size = TINY_BYTES if setting.tiny else HOST_BYTES
    held = {
        "pinned_to_device_gb_per_s": torch.ones(size, dtype=torch.uint8, pin_memory=setting.on_gpu),
        "pageable_to_device_gb_per_s": torch.ones(size, dtype=torch.uint8),
    }
    target = torch.empty(size, dtype=torch.uint8, device=setting.device)

    def copying(source: Tensor) -> Callable[[], Any]:
        return lambda: target.copy_(source, non_blocking=True)

    found = in_turn({name: copying(each) for name, each in held.items()}, setting)
    for name, taken in found.items():
        recorder.add(name, [size / 1e6 / each for each in taken])
