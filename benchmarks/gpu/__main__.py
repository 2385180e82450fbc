"""Measure one stage on a GPU: `python -m benchmarks.gpu STAGE --json FILE`.

Stages: probe, tests, flat, irp, scoring, resnet50, deepspeed, shards, two_four (docs/performance.md
says what each measures). `--tiny` runs one in a moment on a CPU, to see that it runs.
"""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

from benchmarks.gpu.goals import STAGES


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--json", type=Path, help="file to write the figures to, as they come")
    parser.add_argument("--data", type=Path, help="CIFAR-10: train/CLASS/*.jpg, test/CLASS/*.jpg")
    parser.add_argument("--device", default="auto", help="auto, cuda, cpu")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, sizes of a moment")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run one stage; figures that were measured before a failure are in the file."""
    asked = parsed(arguments)
    if asked.tiny:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from autosparse.models.zoo import choose_device
    from benchmarks.gpu.measure import Recorder, Setting

    setting = Setting(choose_device("cpu" if asked.tiny else asked.device), asked.tiny, asked.data)
    recorder = Recorder(asked.stage, asked.json)
    recorder.write()
    importlib.import_module(f"benchmarks.gpu.stage_{asked.stage}").run(setting, recorder)
    recorder.note("finished", True)


if __name__ == "__main__":
    main()
