"""Two "hosts" train together: a launcher each, without ssh; in network namespaces if allowed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from autosparse.core.files import read_json
from tests.integration.ranks import ROOT, SCRIPT, free_port, launcher
from tests.integration.test_training_kills import SETTINGS, trained

LIMIT = 400
"""Seconds after which it is taken to hang."""


@dataclass(frozen=True)
class Hosts:
    """How to run a command on each of two hosts, and where the first one is reached."""

    commands: list[list[str]]
    address: str
    environments: list[dict[str, str]]


@pytest.fixture(params=["one network", "two networks"])
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    if request.param == "one network":
        yield Hosts([[], []], "127.0.0.1", [{}, {}])
        return
    names = [f"autosparse-{os.getpid()}-{rank}" for rank in range(2)]
    links = [f"as{os.getpid() % 100000}-{rank}" for rank in range(2)]
    try:
        for name in names:
            if _ip("netns", "add", name).returncode:
                pytest.skip("network namespaces need root")
        _connect(names, links)
        commands = [["ip", "netns", "exec", name] for name in names]
        interfaces = [{"GLOO_SOCKET_IFNAME": link} for link in links]
        yield Hosts(commands, "10.77.0.1", interfaces)
    finally:
        for name in names:
            _ip("netns", "del", name)


def _connect(names: list[str], links: list[str]) -> None:
    """Lay a cable between two namespaces."""
    done = [_ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])]
    for rank, (name, link) in enumerate(zip(names, links, strict=True), start=1):
        inside = ("-n", name)
        done += [
            _ip("link", "set", link, "netns", name),
            _ip(*inside, "addr", "add", f"10.77.0.{rank}/24", "dev", link),
            _ip(*inside, "link", "set", link, "up"),
            _ip(*inside, "link", "set", "lo", "up"),
        ]
    if any(each.returncode for each in done):
        pytest.skip(f"no virtual network: {[each.stderr for each in done if each.returncode]}")


def _ip(*arguments: str) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no ip command")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_hosts_train_together(hosts: Hosts, tmp_path: Path) -> None:
    hostfile, out, alone = tmp_path / "hostfile", tmp_path / "out", tmp_path / "alone"
    hostfile.write_text("node-a slots=1\nnode-b slots=1\n")
    port = str(free_port())
    processes = []
    for rank in range(2):
        command = [
            *hosts.commands[rank], *launcher(1, port=port), "--hostfile", str(hostfile), "--no_ssh",
            "--node_rank", str(rank), "--master_addr", hosts.address, str(SCRIPT),
            *SETTINGS, "--training.epochs", "2", "--out", str(out),
        ]  # fmt: skip
        log = (tmp_path / f"log{rank}").open("w")
        processes.append(
            subprocess.Popen(
                command, env=_environment(hosts.environments[rank]), stdout=log, stderr=log
            )
        )
    codes = [process.wait(LIMIT) for process in processes]
    words = [(tmp_path / f"log{rank}").read_text() for rank in range(2)]
    assert codes == [0, 0], words
    assert "test_byobnet" in words[0]
    assert "test_byobnet" not in words[1], "only the first rank of all shows the results"
    command = [*launcher(2), str(SCRIPT), *SETTINGS, "--training.epochs", "2", "--out", str(alone)]
    done = subprocess.run(
        command, env=_environment({}), capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert trained(out) == trained(alone), "two hosts are two ranks of one"
    (result,) = out.glob("*/result.json")
    assert len(read_json(result)["history"]) == 2


def _environment(more: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), **more}
