"""Versions of the libraries that a result depends on, and the machine it was made on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

MAIN = ("autosparse", "torch", "timm")
"""Every result depends on these."""
ALSO = ("torchvision", "deepspeed", "ray", "webdataset", "mlflow")
"""Libraries that a training may use as well."""


def library_versions(names: tuple[str, ...] = MAIN) -> dict[str, str]:
    """Return the versions of autosparse, torch and timm (or of others), where installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def environment() -> dict[str, Any]:
    """Return a training's environment: machine, GPUs, Python, and the versions of libraries."""
    import torch

    gpus = range(torch.cuda.device_count())
    return {
        "host": platform.node(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in gpus],
        "python": platform.python_version(),
        "versions": library_versions((*MAIN, *ALSO)),
    }
