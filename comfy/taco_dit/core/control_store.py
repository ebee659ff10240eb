"""What the control plane is made of: connections to the store, waits that can be ended, and a log of events.

The store is torch's TCPStore. A connection serves one blocking call at a time, so every thread that waits borrows one of
its own. A blocking read is never given a time limit of the store's: a `Waits` thread watches the readers instead and
writes `STOPPED` under the key of one that should give up, which wakes it at once. Nothing here imports torch: the
supervisor starts its ranks before it does.
"""

from __future__ import annotations

import datetime
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

NEVER = datetime.timedelta(days=30)  # time limit of calls that wait for other ranks
SUPERVISED = "TACO_SUPERVISED"  # set by our own supervisor, which replaces a rank that ends
INCARNATION = "TACO_INCARNATION"  # number of the process among those that stood for its rank, from 0
STOPPED = b"\x00stopped"
TICK_S = 0.2  # how often waits are checked while a prompt runs
POLL_S = 0.02  # how often a key that holds STOPPED is read again
EVENT_COUNT = "events"
RANK_0_RESTARTED = "rank 0 restarted in its process"  # the reason it gives for having all followers replaced
STOPPING = "stopping"  # set by rank 0 before it tells the others to stop: ranks that end after that are not replaced


def event_key(number: int) -> str:
    """Key of an entry of the event log; the first is 1."""
    return f"event/{number}"


def end_request_key(rank: int) -> str:
    """Key under which a rank asks the supervisor to end another one; the value is why."""
    return f"end rank/{rank}"


def append_event(store: Any, event: dict[str, Any]) -> int:
    """Add an event (plain data, for JSON) to the log that every rank reads; its number."""
    payload = json.dumps(event)
    while True:
        number = int(store.add(EVENT_COUNT, 1))
        if store.compare_set(event_key(number), "", payload) == payload.encode():
            return number


def fill_gaps(store: Any, seen: int = 16) -> None:
    """After a process ended: fill those of the last `seen` events that were counted and perhaps never written."""
    count = int(store.add(EVENT_COUNT, 0))
    for number in range(max(1, count - seen), count + 1):
        store.compare_set(event_key(number), "", json.dumps({"kind": "nothing"}))


class Connections:
    """Connections to the store, lent to one thread at a time; as many as threads use it at once."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._free: list[Any] = []
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self) -> Iterator[Any]:
        """A connection for the body."""
        with self._lock:
            store = self._free.pop() if self._free else None
        store = self._connect() if store is None else store
        try:
            yield store
        finally:
            with self._lock:
                self._free.append(store)


@dataclass
class _Reader:
    key: str
    stop: Callable[[], bool]
    stopped: bool = False


class Waits:
    """Blocking reads, each with a function that says when to give up. The functions run in a thread of this object."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._readers: dict[int, _Reader] = {}
        self._poked = threading.Event()
        self.on_tick: Callable[[], None] = lambda: None  # called every TICK_S while a prompt runs
        self.busy = False  # while a prompt runs, waits are checked every TICK_S; otherwise when one begins
        threading.Thread(target=self._look_after, name="taco-waits", daemon=True).start()

    def get(self, key: str, stop: Callable[[], bool]) -> bytes | None:
        """The value of a key, as soon as it has one; None when `stop` came true first.

        `stop` should stay true once it was; it is called in this object's thread and in the caller's.
        """
        reader = _Reader(key, stop)
        self._readers[id(reader)] = reader
        if not self.busy:
            self.poke()
        try:
            with self._connections.borrow() as store:
                value = bytes(store.get(key))
                while value == STOPPED:  # by this wait, an earlier one or another rank's: the value may still come
                    if stop():
                        return None
                    time.sleep(POLL_S)
                    value = bytes(store.get(key))
        finally:
            del self._readers[id(reader)]
        return value

    def poke(self) -> None:
        """Check all waits now: something happened that may end some."""
        self._poked.set()

    def _look_after(self) -> None:
        while True:
            self._poked.wait(TICK_S if self.busy or self._readers else None)
            self._poked.clear()
            try:
                if self.busy:
                    self.on_tick()
                self._stop_readers()
            except RuntimeError as error:  # the store is gone: the job is ending
                logging.debug("waits are not looked after any more: %s", error)
                return

    def _stop_readers(self) -> None:
        for reader in list(self._readers.values()):
            if not reader.stopped and reader.stop():
                reader.stopped = True
                with self._connections.borrow() as store:
                    store.compare_set(reader.key, "", STOPPED.decode())


class EventReader:
    """Reads the event log from `start` on in a thread of its own; `handle(number, event)` gets every entry in order."""

    def __init__(self, store: Any, start: int, handle: Callable[[int, dict[str, Any]], None]) -> None:
        self._store = store
        self._next = start + 1
        self._handle = handle

    def begin(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="taco-events", daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                payload = self._store.get(event_key(self._next))
            except (RuntimeError, ValueError) as error:  # the store is gone: the job is ending
                logging.debug("the event reader ends: %s", error)
                return
            try:
                self._handle(self._next, json.loads(payload))
            except Exception:  # noqa: BLE001 - the next event must still be heard
                logging.exception("event %d could not be handled", self._next)
            self._next += 1
