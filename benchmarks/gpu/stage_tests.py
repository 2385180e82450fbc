"""The tests that need a GPU, tests/test_gpu.py: how many passed, and which failed with what."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.measure import Recorder, Setting

ROOT = Path(__file__).parents[2]
TEST_FILE = "tests/test_gpu.py"
CHOICE = ["-m", "gpu", "-n", "8"]
"""The host has more to do than the GPU, so that eight processes share one."""
TINY_CHOICE = ["-m", "not gpu", "-n", "0", "-k", "masks"]
SHOWN = 600
"""Characters of a failure that are kept."""


def run(setting: Setting, recorder: Recorder) -> None:
    choice = TINY_CHOICE if setting.tiny else CHOICE
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short",
            f"--junitxml={report}", TEST_FILE, *choice,
        ]  # fmt: skip
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, check=False)
        seconds = time.perf_counter() - started
        if not report.is_file():
            raise SystemExit(f"pytest ended with {done.returncode} and wrote no report")
        passed, failed = counted(report)
    recorder.note("failures", failed)
    recorder.add("tests_passed", [float(passed)])
    recorder.add("tests_failed", [float(len(failed))])
    recorder.add("tests_seconds", [seconds])


def counted(report: Path) -> tuple[int, dict[str, str]]:
    """Return how many tests passed, and what the others said."""
    passed, failed = 0, {}
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = [each for each in case if each.tag in ("failure", "error")]
        if wrong:
            told = wrong[0].get("message") or wrong[0].text or ""
            failed[f"{case.get('classname')}::{case.get('name')}"] = told[:SHOWN]
        elif case.find("skipped") is None:
            passed += 1
    return passed, failed
