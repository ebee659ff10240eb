"""A rank's side of the control plane: values by key, waits that can be ended, the event log, streams to other ranks.

One stream to the hub serves all threads. A thread of this object reads it and wakes whoever waits for an answer.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from .control_channel import Channel, ConnectionLost, Door, RemoteDoor
from .wire import MalformedError, decode, encode

TICK_S = 0.2  # how often a wait looks whether it should end, unless something pokes it

Event = dict[str, Any]


class ControlClient:
    """Connection of this process to the hub. All methods may be called from any thread.

    All raise ConnectionLost when the hub is gone, which means that the job is ending.
    """

    def __init__(self, door: Door | RemoteDoor) -> None:
        self._door = door
        self._channel = door.open("control")
        self._sending = threading.Lock()
        self._numbers = itertools.count(1)
        self._answered = threading.Condition()
        self._answers: dict[int, Any] = {}
        self._asked: set[int] = set()
        self._lost = False
        self._events: queue.SimpleQueue[tuple[int, Event] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="taco-control", daemon=True).start()

    # --- values ------------------------------------------------------------------------------------------------------

    def set(self, key: str, value: bytes) -> None:
        """Write a value; whoever waits for the key gets it."""
        self._send("set", key, value)

    def get(self, key: str, stop: Callable[[], bool] | None = None) -> bytes | None:
        """The value of a key, as soon as it has one; None when `stop` came true first.

        `stop` is called every TICK_S, and after `poke`. Without it this waits for ever and costs nothing.
        """
        value: bytes | None = self._ask("get", key, stop=stop)
        return value

    def peek(self, key: str) -> bytes:
        """The value of a key; empty when there is none."""
        value: bytes = self._ask("peek", key)
        return value

    def add(self, key: str, amount: int) -> int:
        """Add to a counter that begins at 0; what it is then."""
        return int(self._ask("add", key, amount))

    def delete(self, key: str) -> None:
        """Forget a key."""
        self._send("delete", key)

    def drop(self, kind: str, before: int) -> None:
        """Forget all keys and unused streams named `kind/NUMBER/...` with a number below `before`."""
        self._send("drop", kind, before)

    def count(self) -> int:
        """Number of keys and unused streams that the hub holds."""
        return int(self._ask("count"))

    def poke(self) -> None:
        """Have all waits look now whether they should end."""
        with self._answered:
            self._answered.notify_all()

    # --- events ------------------------------------------------------------------------------------------------------

    def append_event(self, event: Event) -> int:
        """Add an event (plain data) to the log that every rank reads; its number, from 1."""
        return int(self._ask("append", event))

    def last_event(self) -> int:
        """Number of the newest event; 0 without any."""
        return int(self._ask("last"))

    def listen(self, after: int, handle: Callable[[int, Event], None]) -> None:
        """Call `handle(number, event)` for every event after number `after`, in order, in a thread of its own."""
        threading.Thread(target=self._handle_events, args=(handle,), name="taco-events", daemon=True).start()
        self._send("listen", after)

    # --- processes and streams ---------------------------------------------------------------------------------------

    def end_rank(self, rank: int, why: str) -> None:
        """Ask the host of the hub to end a rank's process."""
        self._send("end", rank, why)

    def open_pair(self, name: str) -> Channel:
        """A stream to the one other rank that asks for the same name; what is sent before it asks waits for it."""
        return self._door.open("pair", name)

    def close(self) -> None:
        """End the connection; everything that waits raises ConnectionLost."""
        self._channel.close()
        self._door.close()

    # --- messages ----------------------------------------------------------------------------------------------------

    def _send(self, *message: Any) -> None:
        content = encode(message)
        with self._sending:
            self._channel.send(content)

    def _ask(self, request: str, *arguments: Any, stop: Callable[[], bool] | None = None) -> Any:
        number = next(self._numbers)
        with self._answered:
            self._asked.add(number)
        try:
            self._send(request, number, *arguments)
            with self._answered:
                while number not in self._answers:
                    if self._lost:
                        raise ConnectionLost("the control plane is gone")
                    if stop is not None and stop():
                        break
                    self._answered.wait(None if stop is None else TICK_S)
                else:
                    return self._answers[number]
            self._send("forget", number)
            return None
        finally:
            with self._answered:
                self._asked.discard(number)
                self._answers.pop(number, None)

    def _read(self) -> None:
        try:
            while True:
                kind, number, content = decode(self._channel.receive())
                if kind == "event":
                    self._events.put((number, content))
                    continue
                with self._answered:
                    if number in self._asked:
                        self._answers[number] = content
                        self._answered.notify_all()
        except (ConnectionLost, MalformedError, ValueError) as error:
            logging.debug("the control plane is gone: %s", error)
        finally:
            with self._answered:
                self._lost = True
                self._answered.notify_all()
            self._events.put(None)

    def _handle_events(self, handle: Callable[[int, Event], None]) -> None:
        while (entry := self._events.get()) is not None:
            try:
                handle(*entry)
            except Exception:  # noqa: BLE001 - the next event must still be heard
                logging.exception("event %d could not be handled", entry[0])
