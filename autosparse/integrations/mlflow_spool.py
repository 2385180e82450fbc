"""Tracking that never holds up a training: a thread sends, and what it cannot send is kept.

While the server is away or slow, events wait in memory, in order. What is left at the end is
written to `mlflow_unsent.json` in the cell's folder, and sent when the same command is run again.

MLflow's own asynchronous logging (3.17) does not do this. It covers metrics, parameters and tags,
but not creating a run, artifacts or closing it: with the server away `create_run` held the caller
up for 247 s and raised. A batch that fails is dropped after these retries, or after 23 s where
SQLite is locked, and nothing is kept on disk for the next start.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autosparse.core.files import read_json, write_json
from autosparse.integrations import REFUSED
from autosparse.study.config import SparseTrainConfig
from autosparse.study.trainings import SETTINGS, UNSENT, Cell, Observer, unsent
from autosparse.training.steppers import Epoch

logger = logging.getLogger(__name__)

PAUSES = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before the second try, the third …; the last for all that follow."""


SENT = "sent"
"""Comes after the events of a cell's file, which goes once they are sent: a kill may come first."""


@dataclass
class _Event:
    method: str
    cell: Cell
    arguments: list[Any] = field(default_factory=list)
    """Plain data; a config for `begin`."""


class Spooled:
    """An Observer that hands everything on to another one, from a thread.

    Args:
        observer: what sends; it may raise.
    """

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.waiting: deque[_Event] = deque()
        self.changed = threading.Condition()
        self.configs: dict[Path, SparseTrainConfig] = {}
        self.closing = self.warned = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def begin(self, cell: Cell, config: SparseTrainConfig, settings: dict[str, Any]) -> None:
        self._put(_Event("begin", cell, [config, settings]))
        path = cell.folder / UNSENT
        if unsent(cell):
            for method, arguments in read_json(path):
                self._put(_Event(method, cell, arguments))
            self._put(_Event(SENT, cell))

    def found(self, cell: Cell, config: SparseTrainConfig) -> None:
        if unsent(cell):
            path = cell.folder / SETTINGS
            self.begin(cell, config, read_json(path) if path.is_file() else {})

    def epoch(self, cell: Cell, epoch: Epoch) -> None:
        self._put(_Event("epoch", cell, [vars(epoch)]))

    def stopped(self, cell: Cell) -> None:
        self._put(_Event("stopped", cell))

    def failed(self, cell: Cell, reason: str) -> None:
        self._put(_Event("failed", cell, [reason]))

    def end(self, cell: Cell, result: dict[str, Any]) -> None:
        self._put(_Event("end", cell, [result]))

    def close(self, seconds: float = 30.0) -> None:
        """Send what waits, for so long at most; write down the rest."""
        until = time.monotonic() + seconds
        with self.changed:
            self.closing = True
            self.changed.notify_all()
            while self.waiting and time.monotonic() < until:
                self.changed.wait(0.1)
            left = list(self.waiting)
            self.waiting.clear()
        self.thread.join(1.0)
        self._keep(left)

    def _keep(self, left: list[_Event]) -> None:
        by_folder: dict[Path, list[_Event]] = {}
        for event in left:
            by_folder.setdefault(event.cell.folder, []).append(event)
        for folder, events in by_folder.items():
            plain = [[e.method, e.arguments] for e in events if e.method not in ("begin", SENT)]
            write_json(folder / UNSENT, plain)
            logger.warning(
                "%s keeps what could not be sent to MLflow; the same command sends it",
                folder / UNSENT,
            )

    def _put(self, event: _Event) -> None:
        with self.changed:
            self.waiting.append(event)
            self.changed.notify_all()

    def _run(self) -> None:
        tries = 0
        while True:
            with self.changed:
                while not self.waiting:
                    if self.closing:
                        return
                    self.changed.wait()
                event = self.waiting[0]
            try:
                self._send(event)
            except Exception as error:
                if event.method != "begin" and getattr(error, "error_code", "") in REFUSED:
                    logger.warning(
                        "MLflow refuses %s of %s: %s", event.method, event.cell.folder.name, error
                    )
                    self._over(event)
                    continue
                self._warn(error)
                time.sleep(PAUSES[min(tries, len(PAUSES) - 1)])
                tries += 1
                continue
            tries = 0
            self._over(event)

    def _over(self, event: _Event) -> None:
        """Take an event from those that wait."""
        with self.changed:
            if self.waiting and self.waiting[0] is event:
                self.waiting.popleft()
            self.changed.notify_all()

    def _send(self, event: _Event) -> None:
        if event.method == SENT:
            (event.cell.folder / UNSENT).unlink(missing_ok=True)
            return
        arguments = event.arguments
        if event.method == "epoch":
            arguments = [Epoch(**arguments[0])]
        getattr(self.observer, event.method)(event.cell, *arguments)

    def _warn(self, error: Exception) -> None:
        if not self.warned:
            self.warned = True
            reason = " ".join(str(error).split())[:200]
            logger.warning(
                "MLflow cannot be reached (%s); training goes on, and what is tracked is sent "
                "later",
                reason,
            )
