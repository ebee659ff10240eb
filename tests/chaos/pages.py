"""Pages: WebSockets that connect again, one that never reads, and ones that vanish."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from typing import Any

import aiohttp

RETRY_S = 0.3
Handler = Callable[["Page", dict[str, Any]], None]


class Page:
    """A page with an id of its own. `handle(page, message)` gets each text message that is JSON.

    `since`: when the connection that is open now was opened, None while there is none.
    """

    def __init__(self, port: int, handle: Handler) -> None:
        self.id = uuid.uuid4().hex
        self.since: float | None = None
        self.binary = 0
        self._url = f"http://127.0.0.1:{port}/ws?clientId={self.id}"
        self._handle = handle
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Connect, and again whenever the connection ends."""
        self._task = asyncio.get_running_loop().create_task(self._live())

    async def close(self) -> None:
        """Disconnect."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _live(self) -> None:
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError, asyncio.TimeoutError):
                await self._once()
            self.since = None
            await asyncio.sleep(RETRY_S)

    async def _once(self) -> None:
        async with aiohttp.ClientSession() as session, session.ws_connect(self._url, max_msg_size=0) as connection:
            async for message in connection:
                if self.since is None:
                    self.since = time.time()  # the server sends its status at once
                if message.type is aiohttp.WSMsgType.BINARY:
                    self.binary += 1
                elif message.type is aiohttp.WSMsgType.TEXT:
                    self._handle(self, json.loads(message.data))


class DeafPage:
    """A WebSocket that is opened and never read."""

    def __init__(self, port: int) -> None:
        self.id = uuid.uuid4().hex
        self._port = port
        self._socket: socket.socket | None = None

    def open(self) -> None:
        """Connect with a small receive buffer. Raises OSError."""
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.settimeout(5)
        try:
            self._socket.connect(("127.0.0.1", self._port))
            key = base64.b64encode(os.urandom(16)).decode()
            self._socket.sendall(
                f"GET /ws?clientId={self.id} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nUpgrade: websocket\r\n"
                f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
            )
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Disconnect without a farewell."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
