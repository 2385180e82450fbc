"""One writer per folder: a claim that is renewed while its owner lives, and expires when it dies.

`claim.json` names the owner and counts its heartbeats. Another process that wants the folder
watches the file: a claim that has not changed for `EXPIRY` seconds, or whose owner was a process
of this machine that is gone, is dead and is taken over. Clocks are never compared.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from autosparse.core.errors import RunFailed, UsageError
from autosparse.core.files import is_local, write_json

CLAIM = "claim.json"
BEAT, EXPIRY = 10.0, 60.0
"""Seconds between heartbeats; seconds without one after which a claim is dead."""
POLL = 1.0
SETTLE = 1.0
"""Where files cannot be created exclusively: seconds after which the last writer has won."""


class Claim:
    """A claim that this process holds."""

    def __init__(self, path: Path) -> None:
        self.path, self.token = path, secrets.token_hex(8)
        self.beats = 0
        self.lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def content(self) -> dict[str, object]:
        """Return what the file holds."""
        owner = {"host": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}
        return {"token": self.token, **owner, "beats": self.beats}

    def take(self) -> bool:
        """Try to create the file; return whether it is ours."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not is_local(self.path):
            if self.path.exists():
                return False
            write_json(self.path, self.content())
            time.sleep(SETTLE)
            return self._is_ours()
        # The file appears whole: it is written elsewhere and linked.
        temporary = self.path.with_name(f".{self.path.name}.{self.token}")
        try:
            temporary.write_text(json.dumps(self.content()))
            os.link(temporary, self.path)
        except FileExistsError:
            return False
        except FileNotFoundError:  # Removed just now, empty, by who had it before.
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def hold(self) -> None:
        """Begin to renew the claim."""
        self._thread.start()

    def release(self) -> None:
        """Stop renewing, and remove the file if it is ours."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._is_ours():
            with suppress(FileNotFoundError):
                self.path.unlink()

    def check(self) -> None:
        """Raise RunFailed if somebody else took the claim over (this process had stalled)."""
        if self.lost:
            raise RunFailed(f"{self.path.parent} was taken over by another process; stopped here")

    def _beat(self) -> None:
        while not self.lost and not self._stop.wait(BEAT):
            self._renew()

    def _renew(self) -> None:
        """Count a heartbeat if the claim is still ours, with nobody taking it over meanwhile."""
        with _alone_in(self.path):
            if not self._is_ours():
                self.lost = True
                return
            self.beats += 1
            with suppress(RunFailed, OSError):  # A full disk: the next level says so.
                write_json(self.path, self.content())

    def _is_ours(self) -> bool:
        return f'"{self.token}"' in (_read(self.path) or "")


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
        folder: what to claim; made if need be.
        wait: wait for the owner to finish or die; otherwise raise UsageError if it lives. That
            takes up to EXPIRY seconds to find out when it ran on another machine.
        finished: asked while waiting; once it says yes, None is yielded: there is nothing to do.
        name: of the claim's file, where what is claimed is not the whole folder.

    Yields the claim; call its `check` before results are written.
    """
    path = folder / name
    claim = Claim(path)
    made = _missing(folder)
    try:
        taken = _taken(claim, wait, finished)
    except OSError as error:
        raise RunFailed(f"cannot write {path}: {error.strerror or error}") from error
    if not taken:
        yield None
        return
    try:
        claim.hold()
        yield claim
    finally:
        claim.release()
        for empty in made:  # Where the body wrote nothing, nothing is left.
            with suppress(OSError):
                empty.rmdir()


def _missing(folder: Path) -> list[Path]:
    """Return a local folder and those above it, as far as they are not there yet."""
    if not is_local(folder):
        return []
    return [each for each in (folder, *folder.parents) if not each.exists()]


def _taken(claim: Claim, wait: bool, finished: Callable[[], bool]) -> bool:
    seen, since, path = None, time.monotonic(), claim.path
    what = path.parent if path.name == CLAIM else path.with_suffix("")
    while not claim.take():
        if finished():
            return False
        now = _read(path)
        if now != seen:
            if None not in (seen, now) and not wait:
                raise UsageError(f"{what} is being worked on by {_owner(now)}")
            seen, since = now, time.monotonic()
        if now is not None and (_owner_is_gone(now) or time.monotonic() - since > EXPIRY):
            _remove_dead(path, now, claim.token)
            continue
        if _owner_lives_here(now) and not wait:
            raise UsageError(f"{what} is being worked on by {_owner(now)}")
        time.sleep(POLL)
    return True


def _remove_dead(path: Path, content: str, token: str) -> None:
    """Remove a dead claim; of several who try, one succeeds, and never removes a new one."""
    if not is_local(path):
        if _read(path) == content:
            with suppress(FileNotFoundError):
                path.unlink()
        return
    aside = path.with_name(f".{path.name}.dead.{token}")
    with _alone_in(path), suppress(FileNotFoundError):
        if _read(path) != content:
            return
        path.rename(aside)
        if _read(aside) != content:  # It was renewed just now: it is alive.
            with suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


@contextmanager
def _alone_in(path: Path) -> Iterator[None]:
    """Let one process at a time renew or remove a claim, where the file system has locks."""
    handle = None
    try:
        with suppress(OSError):  # No locks here, or the folder is gone: who comes next sees it.
            if is_local(path):
                handle = os.open(path.parent, os.O_RDONLY)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _parsed(content: str | None) -> dict[str, object]:
    try:
        found = json.loads(content or "{}")
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _owner(content: str | None) -> str:
    claim = _parsed(content)
    return f"process {claim.get('pid', '?')} on {claim.get('host', '?')}"


def _owner_is_gone(content: str) -> bool:
    """Whether the owner was a process of this machine that is no more."""
    return _is_of_this_machine(content) and not _owner_lives_here(content)


def _machine() -> str:
    """Name this machine; containers of one name and file system differ in their processes."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {namespace.readlink() if namespace.exists() else ''}".strip()


def _is_of_this_machine(content: str | None) -> bool:
    """Whether name and boot are ours: machines that were cloned have the same name."""
    claim = _parsed(content)
    boot = str(claim.get("started")).partition(":")[0]
    return claim.get("host") == _machine() and boot == str(_started(os.getpid())).partition(":")[0]


def _owner_lives_here(content: str | None) -> bool:
    claim = _parsed(content)
    pid = claim.get("pid")
    if not _is_of_this_machine(content) or not isinstance(pid, int):
        return False
    return claim.get("started") == _started(pid) is not None


def _started(pid: int) -> str | None:
    """Return when a process began (so that a pid used again is told apart); None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return _alive_without_proc(pid)
    return None if fields[0] == "Z" else f"{boot}:{fields[19]}"


def _alive_without_proc(pid: int) -> str | None:
    """Where there is no /proc (macOS): whether the process can be signalled."""
    if Path("/proc/self").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return "alive"
    return "alive"
