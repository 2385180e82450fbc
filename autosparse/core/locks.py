"""One writer per folder: a claim that is renewed while its owner lives, and expires when it dies.

On a file system, also one that several hosts share, a claim is a `filelock.SoftFileLease`: a file
that names host and process. It is taken over at once when its owner was a process of this machine
that is gone, and otherwise when it has not been renewed for `EXPIRY` seconds by our own clock.
Hosts that share a folder need names of their own.

filelock knows file systems only. At a URL (s3://, memory:// …) a claim is a small JSON file with
the same heartbeat; as nothing there can be created exclusively, the last of those who wrote at the
same time has it.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import SoftFileLease, Timeout

from autosparse.core.errors import RunFailed, UsageError
from autosparse.core.files import is_local, write_json

CLAIM = "claim.lock"
BEAT, EXPIRY = 10.0, 60.0
"""Seconds between heartbeats; seconds without one after which a claim is dead."""
POLL = 1.0
"""Seconds between two looks at a claim that another has."""
SETTLE = 1.0
"""At a URL: seconds after which whoever wrote last has the claim."""
_NAMESPACE = "?pidns-"
"""What filelock puts after a container's host name, before the inode of its process namespace."""


class Claim:
    """A claim on a folder of a file system that this process holds, or wants."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lease = SoftFileLease(
            path, lease_duration=EXPIRY, heartbeat_interval=BEAT, thread_local=False
        )
        self._seen: tuple[object, float] = None, 0.0

    def take(self) -> bool:
        """Try to take the claim; return whether it is ours. From then on it is renewed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._is_stale() and not self._lease.owner:
            self._lease.force_break()  # A power cut left a file without an owner.
        try:
            self._lease.acquire(blocking=False)
        except (Timeout, FileNotFoundError):  # The folder was removed just now, as it was empty.
            return False
        return True

    def _is_stale(self) -> bool:
        """Whether a claim is there that was not renewed for EXPIRY seconds by our own clock."""
        now = self.state()
        if now != self._seen[0]:
            self._seen = now, time.monotonic()
        return now is not None and time.monotonic() - self._seen[1] > EXPIRY

    def release(self) -> None:
        """Stop renewing, and remove the claim if it is ours."""
        self._lease.release()

    @property
    def lost(self) -> bool:
        """Whether somebody else took the claim over, because this process had stalled."""
        return self._lease.compromise is not None

    def check(self) -> None:
        """Raise RunFailed if the claim is lost; call it before results are written."""
        if self.lost:
            raise RunFailed(f"{self.path.parent} was taken over by another process; stopped here")

    def owner(self) -> str:
        """Return who has the claim, in words."""
        owner = self._lease.owner
        if owner is None:
            return "another process"
        return f"process {owner.pid} on {owner.hostname.partition(_NAMESPACE)[0]}"

    def state(self) -> object:
        """Return a value that changes with every heartbeat; None if there is no claim."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns

    def owner_is_here(self) -> bool:
        """Whether the owner is a live process of this machine: no need to watch its heartbeat."""
        owner = self._lease.owner
        if owner is None:
            return False
        host, mark, namespace = owner.hostname.partition(_NAMESPACE)
        if mark and namespace != f"{Path('/proc/self/ns/pid').stat().st_ino:x}":
            return False
        return host == socket.gethostname() and not _is_zombie(owner.pid)


def _is_zombie(pid: int) -> bool:
    """Whether a process has ended and its parent has not waited for it; filelock calls it alive."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # Not Linux, or gone by now.
        return False


class RemoteClaim(Claim):
    """A claim at a URL."""

    def __init__(self, path: Path) -> None:
        self.path, self.token = path, secrets.token_hex(8)
        self._lost = False
        self._seen = None, 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def take(self) -> bool:
        if self.state() is not None and not self._is_stale():
            return False
        self._write(0)
        time.sleep(SETTLE)
        if not self._is_ours():
            return False
        self._thread.start()
        return True

    def release(self) -> None:
        self._stop.set()
        self._thread.join()
        if self._is_ours():
            with suppress(FileNotFoundError):
                self.path.unlink()

    @property
    def lost(self) -> bool:
        return self._lost

    def owner(self) -> str:
        try:
            claim = json.loads(self.state() or "{}")
            return f"process {claim['pid']} on {claim['host']}"
        except (ValueError, KeyError, TypeError):
            return "another process"

    def owner_is_here(self) -> bool:
        return False  # Unknown; only its heartbeat shows that it lives.

    def _renew(self) -> None:
        beats, renewed = 0, time.monotonic()
        while not (self._lost or self._stop.wait(BEAT)):
            try:
                if not self._is_ours():
                    self._lost = True
                    return
                beats += 1
                self._write(beats)
                renewed = time.monotonic()
            except Exception:  # Each file system of fsspec raises errors of its own.
                self._lost = time.monotonic() - renewed > EXPIRY - BEAT

    def _write(self, beats: int) -> None:
        owner = {"host": socket.gethostname(), "pid": os.getpid()}
        write_json(self.path, {"token": self.token, **owner, "beats": beats})

    def state(self) -> str | None:
        try:
            return self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None

    def _is_ours(self) -> bool:
        return f'"{self.token}"' in (self.state() or "")


@contextmanager
def claimed(
    folder: Path,
    *,
    wait: bool = False,
    finished: Callable[[], bool] = lambda: False,
    name: str = CLAIM,
) -> Iterator[Claim | None]:
    """Hold the claim on a folder while the body runs.

    Args:
        folder: to claim; it is made if it is not there.
        wait: wait for the owner to finish or die; otherwise raise UsageError if it lives. That
            takes up to EXPIRY seconds to find out when it ran on another machine.
        finished: asked while waiting; once it is True, None is yielded: there is nothing to do.
        name: of the claim's file, if not the whole folder is claimed.

    Yields the claim; call its `check` before results are written.
    """
    path = folder / name
    claim = Claim(path) if is_local(path) else RemoteClaim(path)
    made = _missing(folder)
    try:
        taken = _taken(claim, wait, finished)
    except OSError as error:
        raise RunFailed(f"cannot write {path}: {error.strerror or error}") from error
    if not taken:
        yield None
        return
    try:
        yield claim
    finally:
        claim.release()
        for empty in made:  # Where the body wrote nothing, nothing is left.
            with suppress(OSError):
                empty.rmdir()


def _missing(folder: Path) -> list[Path]:
    """Return those of a local folder and its parents that are not there yet."""
    if not is_local(folder):
        return []
    return [each for each in (folder, *folder.parents) if not each.exists()]


def _taken(claim: Claim, wait: bool, finished: Callable[[], bool]) -> bool:
    """Take the claim; return False if `finished` returns True, so that there is nothing to do."""
    before = None
    while not claim.take():
        if finished():
            return False
        now = claim.state()
        renewed = None not in (before, now) and now != before
        if not wait and (renewed or claim.owner_is_here()):
            path = claim.path
            what = path.parent if path.name == CLAIM else path.with_suffix("")
            raise UsageError(f"{what} is being worked on by {claim.owner()}")
        before = now
        time.sleep(POLL)
    return True
