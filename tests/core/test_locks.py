"""Claims: one writer per folder, whoever dies, stalls or races."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from autosparse.core import locks
from autosparse.core.errors import RunFailed, UsageError
from autosparse.core.files import write_json, write_text
from autosparse.core.locks import CLAIM, claimed
from tests.conftest import holder

ELSEWHERE = {"token": "0" * 16, "host": "another machine", "pid": 7, "beats": 3}
"""A claim at a URL."""


@pytest.fixture()
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT", 0.02), ("POLL", 0.02), ("EXPIRY", 0.4), ("SETTLE", 0.1)):
        monkeypatch.setattr(locks, name, seconds)


def record(folder: Path) -> dict[str, str]:
    """Return what filelock writes, `key=value` in each line but the first."""
    lines = (folder / CLAIM).read_text().splitlines()
    assert lines[0] == "filelock/2"
    return dict(line.split("=", 1) for line in lines[1:])


def write_record(folder: Path, **changed: object) -> None:
    """Put another claim in the place of the one that may be there."""
    fields = {"pid": 7, "host": "another-machine", "mode": "lease", "token": "0" * 32,
              "duration": locks.EXPIRY} | changed  # fmt: skip
    lines = ["filelock/2", *(f"{key}={value}" for key, value in fields.items()), ""]
    write_text(folder / CLAIM, "\n".join(lines))


def pid(folder: Path) -> int:
    return int(record(folder)["pid"])


def content(folder: Path) -> dict:
    """Return a claim at a URL."""
    return json.loads((folder / CLAIM).read_text())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def wait_until(true, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


# Held and released


def test_the_claim_names_its_owner_and_goes_with_the_body(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    with claimed(folder):
        assert names(folder) == [CLAIM]
        assert pid(folder) == os.getpid()
    assert not folder.exists()


def test_a_folder_that_stays_empty_goes_with_the_claim(tmp_path: Path) -> None:
    with claimed(tmp_path / "a" / "b"):
        pass
    assert names(tmp_path) == []
    with claimed(tmp_path / "a" / "b"):
        (tmp_path / "a" / "kept").write_text("")
    assert names(tmp_path / "a") == ["kept"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_claim_goes_when_the_body_fails(tmp_path: Path, error: type) -> None:
    with pytest.raises(error), claimed(tmp_path):
        raise error
    assert names(tmp_path) == []
    with claimed(tmp_path) as claim:
        assert claim is not None


def test_heartbeats_touch_the_file(tmp_path: Path, quick: None) -> None:
    with claimed(tmp_path) as claim:
        assert claim is not None
        first, times = record(tmp_path), set()

        def beaten() -> bool:
            times.add((tmp_path / CLAIM).stat().st_mtime_ns)
            return len(times) > 3

        wait_until(beaten)
        assert record(tmp_path) == first
        claim.check()
    assert names(tmp_path) == []


def test_a_folder_that_is_a_file_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with (
        pytest.raises(RunFailed, match=r"cannot write .*taken") as caught,
        claimed(tmp_path / "taken"),
    ):
        pytest.fail("claimed a file")
    assert "\n" not in str(caught.value)


# Owners that live


def test_a_second_claim_of_this_process_is_refused(tmp_path: Path) -> None:
    with claimed(tmp_path):
        before = (tmp_path / CLAIM).read_bytes()
        with pytest.raises(UsageError, match=f"process {os.getpid()} on "), claimed(tmp_path):
            pytest.fail("claimed twice")
        assert (tmp_path / CLAIM).read_bytes() == before


def test_a_claim_of_a_live_process_is_refused_in_one_line(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(UsageError) as caught, claimed(tmp_path):
            pytest.fail("claimed what another process holds")
        assert f"{tmp_path} is being worked on by process {process.pid} on " in str(caught.value)
        assert "\n" not in str(caught.value)
        assert pid(tmp_path) == process.pid
        assert names(tmp_path) == [CLAIM]


def test_waiting_ends_when_the_owner_is_through(tmp_path: Path, quick: None) -> None:
    order: list[str] = []
    waiting = threading.Event()

    def not_finished() -> bool:
        waiting.set()
        return False

    def second() -> None:
        with claimed(tmp_path, wait=True, finished=not_finished) as claim:
            order.append(f"second, {claim is not None}")

    with claimed(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(20)
        time.sleep(1.5 * locks.EXPIRY)  # Longer than a dead one would last.
        order.append("first")
    thread.join(20)
    assert order == ["first", "second, True"]
    assert names(tmp_path) == []


def test_waiting_ends_when_there_is_nothing_left_to_do(tmp_path: Path, quick: None) -> None:
    asked = iter([False, False, True])
    with claimed(tmp_path):
        with claimed(tmp_path, wait=True, finished=lambda: next(asked)) as claim:
            assert claim is None
        assert pid(tmp_path) == os.getpid()


# Owners that died


def test_a_killed_owner_is_taken_over_at_once(tmp_path: Path) -> None:
    """A claim would expire after a minute."""
    assert locks.EXPIRY >= 60
    with holder(tmp_path) as process:
        process.kill()
        process.wait()
        assert pid(tmp_path) == process.pid
        started = time.monotonic()
        with claimed(tmp_path) as claim:
            assert time.monotonic() - started < 20
            assert claim is not None
            assert pid(tmp_path) == os.getpid()
            assert names(tmp_path) == [CLAIM]


def test_a_killed_owner_whose_parent_has_not_noticed_expires(tmp_path: Path, quick: None) -> None:
    with holder(tmp_path) as process:
        process.kill()
        wait_until(lambda: ") Z " in Path(f"/proc/{process.pid}/stat").read_text())
        write_record(tmp_path, **record(tmp_path) | {"duration": locks.EXPIRY})
        with claimed(tmp_path):
            assert pid(tmp_path) == os.getpid()


def test_a_process_id_that_is_used_again_is_not_the_owner(tmp_path: Path) -> None:
    with claimed(tmp_path):
        owner = record(tmp_path)
    write_record(tmp_path, **owner | {"start": int(owner["start"]) - 1, "token": "0" * 32})
    with claimed(tmp_path) as claim:
        assert claim is not None
        assert record(tmp_path)["start"] == owner["start"]


def test_a_file_beside_others_is_claimed_by_a_name_of_its_own(tmp_path: Path) -> None:
    with claimed(tmp_path, name="one.claim"), claimed(tmp_path, name="two.claim"):
        assert names(tmp_path) == ["one.claim", "two.claim"]
        with (
            pytest.raises(UsageError, match=f"{tmp_path}/one is being worked on"),
            claimed(tmp_path, name="one.claim"),
        ):
            pytest.fail("claimed twice")
    assert names(tmp_path) == []


@pytest.mark.parametrize("wait", [True, False])
def test_a_claim_of_another_machine_expires(tmp_path: Path, quick: None, wait: bool) -> None:
    write_record(tmp_path)
    started = time.monotonic()
    with claimed(tmp_path, wait=wait) as claim:
        assert claim is not None
        assert time.monotonic() - started > locks.EXPIRY
        assert pid(tmp_path) == os.getpid()
    assert names(tmp_path) == []


def test_a_claim_of_another_machine_that_changes_is_alive(tmp_path: Path, quick: None) -> None:
    """Waiting for it lasts until it has not changed for so long."""
    last = [0.0]

    def beat() -> None:
        for _ in range(30):
            (tmp_path / CLAIM).touch()
            last[0] = time.monotonic()
            time.sleep(locks.EXPIRY / 10)

    write_record(tmp_path)
    thread = threading.Thread(target=beat)
    thread.start()
    with claimed(tmp_path, wait=True):
        assert time.monotonic() - last[0] > locks.EXPIRY / 2
    thread.join()


def test_a_claim_of_another_machine_that_changes_is_refused(tmp_path: Path, quick: None) -> None:
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(locks.EXPIRY / 10):
            (tmp_path / CLAIM).touch()

    write_record(tmp_path)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UsageError, match="process 7 on another-machine"), claimed(tmp_path):
            pytest.fail("claimed what lives elsewhere")
    finally:
        stop.set()
        thread.join()
    assert record(tmp_path)["token"] == "0" * 32


def test_a_claim_of_another_container_is_not_taken_for_a_process_of_ours(
    tmp_path: Path, quick: None
) -> None:
    """Of the same host name, with processes of its own: it is watched for as long as any."""
    write_record(tmp_path, host=f"{socket.gethostname()}?pidns-1")
    started = time.monotonic()
    with claimed(tmp_path):
        assert time.monotonic() - started > locks.EXPIRY


@pytest.mark.parametrize("garbage", [b"", b"{", b"\xff\xfe\x00", b"filelock/2\npid=7"])
def test_a_garbled_claim_expires(tmp_path: Path, quick: None, garbage: bytes) -> None:
    """Also an empty one, as a power cut leaves it."""
    (tmp_path / CLAIM).write_bytes(garbage)
    with claimed(tmp_path) as claim:
        assert claim is not None
        assert pid(tmp_path) == os.getpid()
    assert names(tmp_path) == []


# Stalled


def test_an_owner_that_had_stalled_notices_and_leaves_the_new_claim(
    tmp_path: Path, quick: None
) -> None:
    with claimed(tmp_path) as claim:
        assert claim is not None
        write_record(tmp_path)
        wait_until(lambda: claim.lost)
        with pytest.raises(RunFailed, match=f"{tmp_path} was taken over by another process"):
            claim.check()
    assert record(tmp_path)["host"] == "another-machine"


# Races


def race(folder: Path, threads: int = 8) -> int:
    """Let several claim a folder at once; return how many got it, at whatever time."""
    start, others = threading.Barrier(threads), threading.Event()
    outcomes: list[bool] = []

    def one() -> None:
        start.wait()
        try:
            with claimed(folder):
                outcomes.append(True)
                others.wait(20)
        except UsageError:
            outcomes.append(False)
        if outcomes.count(False) == threads - 1:
            others.set()

    running = [threading.Thread(target=one) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
    assert len(outcomes) == threads, "somebody failed"
    return outcomes.count(True)


@pytest.mark.parametrize("dead", [True, False])
def test_of_several_who_want_a_folder_one_gets_it(tmp_path: Path, quick: None, dead: bool) -> None:
    for number in range(25):
        folder = tmp_path / str(number)
        if dead:
            write_record(folder, host=socket.gethostname(), pid=2**22 + 1)
        assert race(folder) == 1
        assert not folder.exists() or names(folder) == []


# Places that are not local


def test_a_remote_claim_is_held_refused_and_released(remote: Path, quick: None) -> None:
    with claimed(remote / "run"):
        assert names(remote / "run") == [CLAIM]
        beats = content(remote / "run")["beats"]
        wait_until(lambda: content(remote / "run")["beats"] > beats)
        with pytest.raises(UsageError, match=f"process {os.getpid()}"), claimed(remote / "run"):
            pytest.fail("claimed twice")
    assert not (remote / "run" / CLAIM).exists()


def test_a_remote_claim_expires(remote: Path, quick: None) -> None:
    write_json(remote / CLAIM, ELSEWHERE)
    started = time.monotonic()
    with claimed(remote) as claim:
        assert claim is not None
        assert time.monotonic() - started > locks.EXPIRY
        assert content(remote)["pid"] == os.getpid()


@pytest.mark.parametrize("failures", [2, 10**9])
def test_a_heartbeat_lives_through_a_network_that_fails_for_a_while(
    remote: Path, quick: None, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    left = [failures]

    def read(self: Path, **_: object) -> str:
        if threading.current_thread() is threading.main_thread() or left[0] == 0:
            return self.read_bytes().decode()
        left[0] -= 1
        raise ValueError("the network is down")

    with claimed(remote / "run") as claim:
        assert claim is not None
        monkeypatch.setattr(type(remote), "read_text", read)
        if failures == 2:
            wait_until(lambda: left == [0])
            beats = content(remote / "run")["beats"]
            wait_until(lambda: content(remote / "run")["beats"] > beats)
        else:
            wait_until(lambda: claim.lost)
        assert claim.lost == (failures > 2)


def test_of_several_who_want_a_remote_folder_one_gets_it(
    remote: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "SETTLE", 1.5)
    for number in range(2):
        write_json(remote / str(number) / CLAIM, ELSEWHERE)
        assert race(remote / str(number)) == 1
