"""The control plane's server: values by key, and a log of events that every rank reads.

It runs in threads of the supervisor, or of rank 0 where torchrun started the ranks. Ranks talk to it through
`ControlClient`. A message is a tuple, its first item the name of a method `_do_...` of the hub.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import socket
import threading
from collections.abc import Callable
from typing import Any

from .control_channel import (
    Channel,
    ConnectionLost,
    Forged,
    demand_proof,
    peer_user,
    private_directory,
)
from .wire import MalformedError, decode, encode

KEPT_EVENTS = 10_000  # for ranks that begin to listen later


class _Connection:
    """A rank's stream to the hub; what is sent waits in a queue, so a rank that does not read delays nobody."""

    def __init__(self, hub: Hub, channel: Channel) -> None:
        self.channel = channel
        self._hub = hub
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.waiting: dict[int, str] = {}  # requests that wait for a key

    def begin(self) -> None:
        """Start to read and to send."""
        for work in (self._read, self._write):
            threading.Thread(target=work, name="taco-hub", daemon=True).start()

    def send(self, message: tuple[Any, ...]) -> None:
        self._outgoing.put(encode(message))

    def _read(self) -> None:
        try:
            while True:
                self._hub.handle(self, decode(self.channel.receive()))
        except ConnectionLost:
            pass
        except (Forged, MalformedError, TypeError, ValueError, KeyError, AttributeError) as error:
            logging.warning("TACO-DiT: a connection to the control plane is closed: %s", error)
        finally:
            self.close()

    def _write(self) -> None:
        with contextlib.suppress(ConnectionLost):
            while (message := self._outgoing.get()) is not None:
                self.channel.send(message)

    def close(self) -> None:
        self._hub.forget(self)
        self._outgoing.put(None)
        self.channel.close()


class Hub:
    """Keys, events and streams of one job. All methods may be called from any thread.

    `on_end_request(rank, why)` is called when a rank asks for another one to be ended.
    """

    def __init__(self, on_end_request: Callable[[int, str], None] | None = None) -> None:
        self._on_end_request = on_end_request
        self._lock = threading.RLock()
        self._values: dict[str, bytes] = {}
        self._waiting: dict[str, list[tuple[_Connection, int]]] = {}
        self._events: list[dict[str, Any]] = []
        self._first_event = 1  # number of the first event that is kept
        self._listeners: list[_Connection] = []
        self._connections: set[_Connection] = set()
        self._ends: dict[str, socket.socket] = {}  # streams of pairs whose second rank has not asked yet
        self._listening: list[socket.socket] = []
        self._path: str | None = None
        self._doors: list[socket.socket] = []

    # --- for the process that hosts the hub ----------------------------------------------------------------------------

    def peek(self, key: str) -> bytes:
        """A value; empty when there is none."""
        with self._lock:
            return self._values.get(key, b"")

    def append_event(self, event: dict[str, Any]) -> int:
        """Add plain data to the log; its number, from 1."""
        with self._lock:
            self._events.append(event)
            number = self._first_event + len(self._events) - 1
            for listener in self._listeners:
                listener.send(("event", number, event))
            surplus = len(self._events) - KEPT_EVENTS
            if surplus > 0:
                del self._events[:surplus]
                self._first_event += surplus
            return number

    def clear(self) -> None:
        """Forget everything and everybody: all ranks are started again."""
        with self._lock:
            connections, self._connections = list(self._connections), set()
            doors, self._doors = self._doors, []
            for end in self._ends.values():
                end.close()
            self._ends.clear()
            self._values.clear()
            self._waiting.clear()
            self._events.clear()
            self._first_event = 1
            self._listeners.clear()
        for connection in connections:
            connection.close()
        for door in doors:
            with contextlib.suppress(OSError):
                door.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Stop listening, and forget everything."""
        for listener in self._listening:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        self.clear()

    # --- doors -----------------------------------------------------------------------------------------------------------

    def make_door(self) -> socket.socket:
        """A door for a process that is about to be started: the end that it inherits; close it after that."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._serve_door(ours)
        return theirs

    def _serve_door(self, door: socket.socket) -> None:
        with self._lock:
            self._doors.append(door)
        threading.Thread(target=self._obey_door, args=(door,), name="taco-door", daemon=True).start()

    def _obey_door(self, door: socket.socket) -> None:
        try:
            while packet := door.recv(4096):
                request = json.loads(packet)
                theirs = self._open(request["want"], str(request["name"]))
                socket.send_fds(door, [str(request["nonce"]).encode()], [theirs.fileno()])
                theirs.close()
        except (OSError, ValueError, KeyError, TypeError) as error:
            logging.debug("a door of the control plane is closed: %s", error)
        finally:
            with self._lock:
                if door in self._doors:
                    self._doors.remove(door)
            door.close()

    def _open(self, want: str, name: str) -> socket.socket:
        if want == "pair":
            with self._lock:
                waiting = self._ends.pop(name, None)
                if waiting is not None:
                    return waiting
                mine, self._ends[name] = socket.socketpair()
                return mine
        ours, theirs = socket.socketpair()
        self._connect(Channel(ours))
        return theirs

    def _connect(self, channel: Channel) -> None:
        connection = _Connection(self, channel)
        with self._lock:
            self._connections.add(connection)
        connection.begin()

    def listen_at(self, path: str) -> None:
        """Be the door for processes of this user, at a UNIX socket in a directory of its own.

        Raises PermissionError when others can enter that directory.
        """
        private_directory(os.path.dirname(path))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(path)
        self._path = path
        self._accept(listener, self._admit_process)

    def listen_on(self, address: tuple[str, int], secret: bytes) -> int:
        """Be the door for other hosts on one address; returns the port. Raises OSError when it cannot be bound."""
        listener = socket.create_server(address)
        self._accept(listener, lambda connection: self._admit_host(connection, secret))
        return int(listener.getsockname()[1])

    def _accept(self, listener: socket.socket, admit: Callable[[socket.socket], None]) -> None:
        listener.listen(1024)
        self._listening.append(listener)

        def run() -> None:
            while True:
                try:
                    connection = listener.accept()[0]
                except OSError:  # closed
                    return
                threading.Thread(target=admit, args=(connection,), name="taco-admit", daemon=True).start()

        threading.Thread(target=run, name="taco-accept", daemon=True).start()

    def _admit_process(self, connection: socket.socket) -> None:
        if peer_user(connection) == os.getuid():
            self._serve_door(connection)
            return
        logging.warning("TACO-DiT: user %d tried to connect to the control plane: refused", peer_user(connection))
        connection.close()

    def _admit_host(self, connection: socket.socket, secret: bytes) -> None:
        peer = connection.getpeername()[0]
        try:
            channel = demand_proof(connection, secret)
            request = json.loads(channel.receive())
            connection.settimeout(None)
            if request["want"] == "control":
                self._connect(channel)
                return
            self._join(str(request["name"]), connection, channel)
        except (OSError, ValueError, KeyError) as error:
            logging.warning("TACO-DiT: %s tried to connect to the control plane: refused (%s)", peer, error)
            connection.close()

    def _join(self, name: str, connection: socket.socket, channel: Channel) -> None:
        """Pass bytes between the two connections that ask for one name."""
        with self._lock:
            first = self._ends.pop(name, None)
            if first is None:
                self._ends[name] = connection
        channel.send(b"a" if first is None else b"b")
        if first is not None:
            for source, target in ((first, connection), (connection, first)):
                threading.Thread(target=_copy, args=(source, target), name="taco-relay", daemon=True).start()

    # --- what ranks ask for ------------------------------------------------------------------------------------------------

    def handle(self, connection: _Connection, message: tuple[Any, ...]) -> None:
        """Do what a rank's message says."""
        name, *arguments = message
        method = getattr(self, f"_do_{name}", None)
        if method is None:
            raise KeyError(f"unknown request {str(name)[:50]!r}")
        with self._lock:
            if connection in self._connections:  # not one of ranks that are being started again
                method(connection, *arguments)

    def forget(self, connection: _Connection) -> None:
        """A connection is closed."""
        with self._lock:
            self._connections.discard(connection)
            if connection in self._listeners:
                self._listeners.remove(connection)
            for number in list(connection.waiting):
                self._do_forget(connection, number)

    def _do_set(self, connection: _Connection, key: str, value: bytes) -> None:
        self._values[key] = value
        for waiting, number in self._waiting.pop(key, []):
            del waiting.waiting[number]
            waiting.send(("answer", number, value))

    def _do_get(self, connection: _Connection, number: int, key: str) -> None:
        if key in self._values:
            connection.send(("answer", number, self._values[key]))
        else:
            connection.waiting[number] = key
            self._waiting.setdefault(key, []).append((connection, number))

    def _do_forget(self, connection: _Connection, number: int) -> None:
        key = connection.waiting.pop(number, None)
        if key in self._waiting and (connection, number) in self._waiting[key]:
            self._waiting[key].remove((connection, number))
            if not self._waiting[key]:
                del self._waiting[key]

    def _do_peek(self, connection: _Connection, number: int, key: str) -> None:
        connection.send(("answer", number, self._values.get(key, b"")))

    def _do_add(self, connection: _Connection, number: int, key: str, amount: int) -> None:
        total = int(self._values.get(key, b"0")) + amount
        self._do_set(connection, key, str(total).encode())
        connection.send(("answer", number, total))

    def _do_delete(self, connection: _Connection, key: str) -> None:
        self._values.pop(key, None)

    def _do_drop(self, connection: _Connection, kind: str, before: int) -> None:
        """Forget what belongs to numbers below `before`: keys and pairs that begin with `kind/NUMBER/`."""
        for key in [key for key in self._values if _number_of(key, kind) < before]:
            del self._values[key]
        for name in [name for name in self._ends if _number_of(name, kind) < before]:
            self._ends.pop(name).close()

    def _do_count(self, connection: _Connection, number: int) -> None:
        connection.send(("answer", number, len(self._values) + len(self._ends)))

    def _do_append(self, connection: _Connection, number: int, event: dict[str, Any]) -> None:
        connection.send(("answer", number, self.append_event(event)))

    def _do_last(self, connection: _Connection, number: int) -> None:
        connection.send(("answer", number, self._first_event + len(self._events) - 1))

    def _do_listen(self, connection: _Connection, after: int) -> None:
        self._listeners.append(connection)
        start = max(after + 1, self._first_event)
        for number, event in enumerate(self._events[start - self._first_event :], start):
            connection.send(("event", number, event))

    def _do_end(self, connection: _Connection, rank: int, why: str) -> None:
        if self._on_end_request is not None:
            self._on_end_request(rank, why)


def _number_of(name: str, kind: str) -> float:
    """The number in `kind/NUMBER/...`; infinite for other names."""
    parts = name.split("/", 2)
    return int(parts[1]) if len(parts) == 3 and parts[0] == kind and parts[1].isdigit() else float("inf")


def _copy(source: socket.socket, target: socket.socket) -> None:
    buffer = memoryview(bytearray(1 << 20))
    with contextlib.suppress(OSError):
        while count := source.recv_into(buffer):
            target.sendall(buffer[:count])
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
