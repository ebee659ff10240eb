"""Messages on their way to one page: a bounded queue and a task that sends it, so that a slow page delays no other.

What a page does not take in time waits here. Of messages that make older ones useless (previews, the queue's length) only
the latest waits. A page that is too far behind in spite of that is disconnected with close code 1013; it may connect again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from dataclasses import dataclass

from aiohttp import web

MAX_BYTES = 64 * 2**20  # most bytes that wait for a page
MAX_MESSAGES = 10_000
CLOSE_S = 5.0  # how long a disconnected page may take to read the reason
TOO_FAR_BEHIND = 1013  # "try again later"


@dataclass
class _Message:
    content: str | bytes
    replaces: str | None  # of waiting messages with the same key only the latest is kept
    dropped: bool = False

    def __len__(self) -> int:
        return len(self.content)


class PageQueue:
    """The queue to one page. `put` never waits; `close` ends it."""

    def __init__(self, socket: web.WebSocketResponse, name: str) -> None:
        self._socket = socket
        self._name = name
        self._waiting: deque[_Message] = deque()
        self._latest: dict[str, _Message] = {}
        self._bytes = 0
        self._news = asyncio.Event()
        self._overrun = False
        self._sender = asyncio.get_running_loop().create_task(self._send())
        self._closing: asyncio.Task[None] | None = None

    def put(self, content: str | bytes, replaces: str | None = None) -> None:
        """Queue a text (str) or binary (bytes) message; in the event loop's thread."""
        if self._overrun:
            return
        message = _Message(content, replaces)
        if replaces is not None:
            older = self._latest.get(replaces)
            if older is not None:
                older.dropped = True
                self._bytes -= len(older)
                older.content = ""
            self._latest[replaces] = message
        self._waiting.append(message)
        self._bytes += len(message)
        self._news.set()
        if self._bytes > MAX_BYTES or len(self._waiting) > MAX_MESSAGES:
            self._disconnect()

    def close(self) -> None:
        """Forget what waits and end the sender: the page has gone."""
        self._sender.cancel()
        self._waiting.clear()
        self._latest.clear()

    async def _send(self) -> None:
        while True:
            while not self._waiting:
                self._news.clear()
                await self._news.wait()
            message = self._waiting.popleft()
            if message.dropped:
                continue
            self._bytes -= len(message)
            if message.replaces is not None:
                del self._latest[message.replaces]
            try:
                if isinstance(message.content, str):
                    await self._socket.send_str(message.content)
                else:
                    await self._socket.send_bytes(message.content)
            except (ConnectionError, RuntimeError) as error:
                logging.debug("page %s cannot be sent to: %s", self._name, error)
                return  # the connection is closed; its handler forgets this queue

    def _disconnect(self) -> None:
        self._overrun = True
        logging.warning(
            "page %s is %d messages (%.0f MiB) behind and is disconnected",
            self._name,
            len(self._waiting),
            self._bytes / 2**20,
        )
        self.close()
        self._closing = asyncio.get_running_loop().create_task(self._close_socket())

    async def _close_socket(self) -> None:
        writer = self._socket._writer
        with contextlib.suppress(TimeoutError, ConnectionError, RuntimeError):
            closing = self._socket.close(code=TOO_FAR_BEHIND, message=b"too far behind", drain=False)
            await asyncio.wait_for(closing, CLOSE_S)
        transport = getattr(writer, "transport", None)
        if transport is not None:
            transport.abort()
