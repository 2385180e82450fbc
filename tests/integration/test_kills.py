"""Twenty kills of worker, raylet and driver: the corpus ends as the unbroken one does."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

import autosparse
from autosparse.core.errors import UserError
from autosparse.core.files import read_card, read_json

ROOT = Path(autosparse.__file__).parent.parent
KILLS, SEED = 20, 4
LIMIT = 1500
"""Seconds after which it is taken to hang."""
PLAN = """
models: [{name: test_byobnet}, {name: test_resnet}]
data: [{name: digits, train_limit: 1000}]
seeds: [0, 1]
training: {epochs: 6, batch_size: 50}
levels: 5
final_density: 0.05
"""
LEVELS = 4 * 6


def start_driver(config: Path, out: Path, address: str | None) -> subprocess.Popen:
    """Start the job, as on a cluster or by itself."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    if address:
        environment["RAY_ADDRESS"] = address
    command = [sys.executable, "ray_jobs/grow_corpus.py", "--config", str(config)]
    return subprocess.Popen(
        [*command, "--out", str(out)],
        cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


class Chaos:
    """A cluster of a head without CPUs and two nodes, and a driver; all of them get killed."""

    def __init__(self, config: Path, out: Path) -> None:
        self.config, self.out = config, out
        self.random = random.Random(SEED)
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(2)]
        self.driver = start_driver(config, out, self.cluster.address)
        self.killed = {"worker": 0, "raylet": 0, "driver": 0}
        self.levels: dict[tuple[str, int], dict] = {}

    def look(self) -> None:
        """Take note of levels the first time they are seen; none may ever change."""
        for path in self.out.glob("*/levels/*/level.safetensors"):
            key = (path.parents[2].name, int(path.parent.name))
            try:
                entry = {k: v for k, v in read_card(path).items() if k != "next"}
            except UserError:
                continue  # The run was finished just now, and its levels folded into one file.
            assert self.levels.setdefault(key, entry) == entry, f"level {key} was done twice"

    def wait(self, seconds: float, levels: float = LEVELS) -> None:
        """Look on for so long, or until so many levels were seen, or until the driver ends."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.driver.poll() is None:
            self.look()
            if len(self.levels) > levels:
                return
            time.sleep(0.05)

    def kill(self) -> bool:
        """Kill something, and start a new one in its place; return whether there was one.

        A driver that has just ended is not killed, and not started again.
        """
        what = self.random.choice(list(self.killed))
        if what == "worker":
            found = [each for node in self.nodes for each in workers(node) if is_run(each)]
            if not found:
                return False
            self.random.choice(found).kill()
        elif what == "raylet":
            place = self.random.randrange(2)
            self.cluster.remove_node(self.nodes[place], allow_graceful=False)
            self.nodes[place] = self.cluster.add_node(num_cpus=1)
        else:
            self.driver.kill()
            if self.driver.wait() != -signal.SIGKILL:
                return False
            self.driver = start_driver(self.config, self.out, self.cluster.address)
        self.killed[what] += 1
        return True


def workers(node: Any) -> list[psutil.Process]:
    """The processes that one node's raylet has started."""
    raylet = node.all_processes["raylet"][0].process.pid
    try:
        return psutil.Process(raylet).children(recursive=True)
    except psutil.Error:
        return []


def is_run(process: psutil.Process) -> bool:
    try:
        return any("_one_run" in part for part in process.cmdline())
    except psutil.Error:
        return False


@pytest.mark.slow
@pytest.mark.timeout(LIMIT + 600)
def test_a_corpus_survives_twenty_kills(tmp_path: Path) -> None:
    config = tmp_path / "plan.yaml"
    config.write_text(PLAN)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    unbroken = start_driver(config, whole, None)
    assert unbroken.wait(LIMIT) == 0, unbroken.stderr and unbroken.stderr.read()[-2000:]
    started = time.monotonic()
    chaos = Chaos(config, broken)
    try:
        while sum(chaos.killed.values()) < KILLS and chaos.driver.poll() is None:
            assert time.monotonic() - started < LIMIT, chaos.killed
            # Often enough before much is done, and at any moment of start, level and end; sooner
            # where the machine is quick, so that it does not end before the last kill.
            share = (sum(chaos.killed.values()) + 1) / KILLS
            chaos.wait(chaos.random.uniform(0.5, 14), share * LEVELS * 0.8)
            chaos.kill()
        while chaos.driver.poll() is None:
            assert time.monotonic() - started < LIMIT, "it hangs"
            chaos.wait(5)
        assert chaos.driver.returncode == 0, chaos.driver.stderr.read()[-3000:]
    finally:
        chaos.driver.kill()
        chaos.cluster.shutdown()
    assert sum(chaos.killed.values()) == KILLS, f"it ended after {chaos.killed}: train for longer"
    assert min(chaos.killed.values()) >= 1
    names, found_names = (sorted(p.parent.name for p in each.glob("*/card.json"))
                          for each in (whole, broken))  # fmt: skip
    assert len(names) == 4 and found_names == names
    for name in names:
        expected, found = (read_json(each / name / "finished.json") for each in (whole, broken))
        assert found["tensors"] == expected["tensors"]
        levels = read_card(broken / name / "run.safetensors")["levels"]
        seen = {level: entry for (run, level), entry in chaos.levels.items() if run == name}
        assert seen, f"no level of {name} was seen before it was finished"
        assert all(levels[level] == entry for level, entry in seen.items()), "done twice"
        assert not (broken / name / "claim.lock").exists()
        assert not list((broken / name).rglob(".*.tmp"))
