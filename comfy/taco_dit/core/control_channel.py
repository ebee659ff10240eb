"""Byte streams between processes of a job, and how a process gets them.

On one host a stream is one end of a socket pair. The process that hosts the control hub makes the pair and sends an end
through a *door*, a socket that the supervisor's children inherit; nothing listens, so nobody else can connect. Ranks that
torchrun starts on one host find the door at a UNIX socket in a directory of their user's own. Between hosts a stream is a
TCP connection; both sides prove that they know the job's secret, and everything they send carries an HMAC-SHA256 with a
running number, so that nothing can be forged, changed, repeated or left out unnoticed. It is not encrypted.

Nothing here imports torch: the supervisor starts its ranks before it does anything expensive.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

HANDSHAKE_S = 10.0
START_S = 600.0  # how long a rank waits for the host of the hub to start
LONGEST_MESSAGE = 1 << 32  # bytes; a longer length can only be an error
_LENGTH = struct.Struct("<Q")
_CHUNK = 1 << 20  # bytes under one signature
_SIGNATURE = hashlib.sha256().digest_size
_REQUEST = 4096  # bytes of a request at a door


class ConnectionLost(ConnectionError):
    """The other end of a stream is gone."""


class Forged(ConnectionError):
    """Bytes that no rank of this job can have sent."""


class Signer:
    """Signatures of one direction of a stream, each over a running number and the bytes."""

    def __init__(self, key: bytes) -> None:
        self._start = hmac.new(key, digestmod=hashlib.sha256)
        self._number = 0

    def sign(self, content: Any) -> bytes:
        """The next signature."""
        state = self._start.copy()
        state.update(_LENGTH.pack(self._number))
        state.update(content)
        self._number += 1
        return state.digest()


class Channel:
    """A stream between two processes. One thread may send while another receives; `close` may be called by any."""

    def __init__(
        self, connection: socket.socket, sending: Signer | None = None, receiving: Signer | None = None
    ) -> None:
        connection.settimeout(None)
        self._socket = connection
        self._sending = sending
        self._receiving = receiving

    def send_bytes(self, content: Any) -> None:
        """Send a buffer whose length the receiver knows. Raises ConnectionLost."""
        view = memoryview(content).cast("B")
        try:
            if self._sending is None:
                self._socket.sendall(view)
                return
            for start in range(0, len(view), _CHUNK):
                part = view[start : start + _CHUNK]
                self._socket.sendall(part)
                self._socket.sendall(self._sending.sign(part))
        except OSError as error:
            raise ConnectionLost(f"connection closed while sending: {error}") from None

    def receive_into(self, buffer: Any) -> None:
        """Fill a buffer. Raises ConnectionLost, Forged."""
        view = memoryview(buffer).cast("B")
        if self._receiving is None:
            self._fill(view)
            return
        signature = bytearray(_SIGNATURE)
        for start in range(0, len(view), _CHUNK):
            part = view[start : start + _CHUNK]
            self._fill(part)
            self._fill(memoryview(signature))
            if not hmac.compare_digest(self._receiving.sign(part), signature):
                raise Forged("a message with a wrong signature")

    def _fill(self, view: memoryview) -> None:
        while len(view):
            try:
                count = self._socket.recv_into(view)
            except OSError as error:
                raise ConnectionLost(f"connection closed while receiving: {error}") from None
            if count == 0:
                raise ConnectionLost("connection closed by the other process")
            view = view[count:]

    def send(self, message: bytes) -> None:
        """Send a message of any length. Raises ConnectionLost."""
        self.send_bytes(_LENGTH.pack(len(message)))
        self.send_bytes(message)

    def receive(self) -> bytes:
        """The next message. Raises ConnectionLost, Forged."""
        header = bytearray(_LENGTH.size)
        self.receive_into(header)
        length = _LENGTH.unpack(header)[0]
        if length > LONGEST_MESSAGE:
            raise Forged(f"a message of {length} bytes")
        message = bytearray(length)
        self.receive_into(message)
        return bytes(message)

    def close(self) -> None:
        """End both directions; a thread that sends or receives, here or at the other end, gets ConnectionLost."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


# --- doors ----------------------------------------------------------------------------------------------------------------


class Door:
    """Where a process gets its streams on one host: a packet socket to the process that hosts the hub."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lock = threading.Lock()

    def open(self, want: str, name: str = "") -> Channel:
        """A new stream: to the hub (`control`) or to the rank that asks for the same name (`pair`).

        Raises ConnectionLost.
        """
        nonce = secrets.token_hex(8)
        request = json.dumps({"nonce": nonce, "want": want, "name": name}).encode()
        with self._lock:
            try:
                self._socket.send(request)
                while True:
                    answer, descriptors, _, _ = socket.recv_fds(self._socket, _REQUEST, 1)
                    if not answer:
                        raise ConnectionLost("the control plane is gone")
                    if answer.decode() == nonce and descriptors:
                        return Channel(socket.socket(fileno=descriptors[0]))
                    for descriptor in descriptors:  # of a request before `execv`, by the program this process was
                        os.close(descriptor)
            except OSError as error:
                raise ConnectionLost(f"the control plane is gone: {error}") from None

    def close(self) -> None:
        """No more streams will be needed."""
        self._socket.close()


class RemoteDoor:
    """The same between hosts: every stream is a TCP connection to the hub, which joins the two of a pair."""

    def __init__(self, address: tuple[str, int], secret: bytes) -> None:
        self._address = address
        self._secret = secret

    def open(self, want: str, name: str = "") -> Channel:
        """As `Door.open`."""
        connection = _connect_within(START_S, lambda: socket.create_connection(self._address, HANDSHAKE_S))
        try:
            return self._introduce(connection, want, name)
        except BaseException:
            connection.close()
            raise

    def _introduce(self, connection: socket.socket, want: str, name: str) -> Channel:
        channel = prove(connection, self._secret)
        channel.send(json.dumps({"want": want, "name": name}).encode())
        if want == "control":
            return channel
        # From here the hub passes on bytes that it does not look at: they are signed from rank to rank.
        side = channel.receive().decode()
        connection.settimeout(None)
        keys = [_derived(self._secret, f"pair {name} {end}".encode()) for end in ("a", "b")]
        mine, theirs = keys if side == "a" else keys[::-1]
        return Channel(connection, Signer(mine), Signer(theirs))

    def close(self) -> None:
        """As `Door.close`; there is nothing to close here."""


def door_at(path: str) -> Door:
    """The door of another process of the same user at a UNIX socket, which may appear later. Raises ConnectionLost."""

    def connect() -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(path)
        except OSError:
            connection.close()
            raise
        return connection

    connection = _connect_within(START_S, connect)
    if peer_user(connection) != os.getuid():
        connection.close()
        raise ConnectionLost(f"{path} belongs to another user")
    return Door(connection)


def _connect_within(seconds: float, connect: Callable[[], socket.socket]) -> socket.socket:
    end = time.monotonic() + seconds
    while True:
        try:
            return connect()
        except OSError as error:
            if time.monotonic() > end:
                raise ConnectionLost(f"the control plane cannot be reached: {error}") from None
            time.sleep(0.05)


def peer_user(connection: socket.socket) -> int:
    """User id of the process at the other end of a UNIX socket."""
    size = struct.calcsize("3i")
    return int(struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[1])


def private_directory(path: str) -> str:
    """Make a directory that only this user can enter, or check that it is one. Raises PermissionError."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(
            f"{path} must be a directory of this user that others cannot enter: remove it, and it will be made again"
        )
    return path


# --- proofs ---------------------------------------------------------------------------------------------------------------


def _derived(secret: bytes, label: bytes) -> bytes:
    return hmac.digest(secret, label, "sha256")


def prove(connection: socket.socket, secret: bytes) -> Channel:
    """On the side that connects: show that we know the secret, and check that the other side does. Raises Forged."""
    raw = Channel(connection)
    connection.settimeout(HANDSHAKE_S)
    theirs, mine = bytearray(32), secrets.token_bytes(32)
    raw.receive_into(theirs)
    both = bytes(theirs) + mine
    raw.send_bytes(mine + _derived(secret, b"client" + both))
    proof = bytearray(_SIGNATURE)
    raw.receive_into(proof)
    if not hmac.compare_digest(proof, _derived(secret, b"server" + both)):
        raise Forged("the host of the control plane does not know this job's secret")
    return Channel(connection, Signer(_derived(secret, b"up" + both)), Signer(_derived(secret, b"down" + both)))


def demand_proof(connection: socket.socket, secret: bytes) -> Channel:
    """On the side that listens. Raises Forged, ConnectionLost."""
    raw = Channel(connection)
    connection.settimeout(HANDSHAKE_S)
    mine, answer = secrets.token_bytes(32), bytearray(32 + _SIGNATURE)
    raw.send_bytes(mine)
    raw.receive_into(answer)
    both = mine + bytes(answer[:32])
    if not hmac.compare_digest(answer[32:], _derived(secret, b"client" + both)):
        raise Forged("a connection without this job's secret")
    raw.send_bytes(_derived(secret, b"server" + both))
    return Channel(connection, Signer(_derived(secret, b"down" + both)), Signer(_derived(secret, b"up" + both)))
