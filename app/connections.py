"""Time limits for requests that are not sent to their end, so that they do not occupy connections for ever.

Headers must be complete within HEADERS_S after a connection is made or a request begins. A body may take as long as it
needs while parts of it arrive; without one for BODY_S it is given up (408).
"""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from app.access import Handler

HEADERS_S = 15.0
BODY_S = 30.0
IDLE_S = 75.0  # between two requests of a connection; more than proxies wait


class _Connection(web.RequestHandler):
    """A connection that is closed when its next request's headers take too long."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._limit: asyncio.TimerHandle | None = None
        self._answering = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._answering and self._limit is None:
            self._expect_headers()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        self._limit = asyncio.get_running_loop().call_later(HEADERS_S, self._too_late)

    def _too_late(self) -> None:
        self._limit = None
        if not self._answering:
            self.force_close()

    def _stop_waiting(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def begin(self) -> None:
        """A request's headers are complete."""
        self._answering = True
        self._stop_waiting()

    async def finish_response(self, *arguments: Any) -> Any:
        """Send the answer. Until it is sent, what arrives is the next request, which may wait."""
        try:
            return await super().finish_response(*arguments)
        finally:
            self._answering = False


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """`web.AppRunner` whose connections have the limits for headers."""

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(
            made.request_handler, request_factory=made.request_factory, keepalive_timeout=IDLE_S, **self._kwargs
        )


class _BodyLimit:
    """Gives a request's body up when nothing of it arrives for BODY_S although the server is reading."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._received = -1
        self.error: web.HTTPRequestTimeout | None = None
        self._timer: asyncio.Handle = asyncio.get_running_loop().call_soon(self._check)

    def _check(self) -> None:
        content, transport = self._request.content, self._request.transport
        if content.is_eof() or transport is None:
            return
        # a transport that is not read from waits for the handler, not for the client
        if content.total_bytes == self._received and getattr(transport, "is_reading", lambda: True)():
            text = f"no part of the request's body arrived for {BODY_S:.0f} s; send it again"
            self.error = web.HTTPRequestTimeout(text=text)
            self.error.force_close()
            content.set_exception(self.error)
            return
        self._received = content.total_bytes
        self._timer = asyncio.get_running_loop().call_later(BODY_S, self._check)

    def end(self) -> None:
        """The request is answered; nobody waits for the rest of a body that was given up."""
        self._timer.cancel()
        if self.error is not None:
            self._request.content.feed_eof()


@web.middleware
async def request_limits(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The limits, for the time in which a request is answered."""
    connection = request.protocol
    if isinstance(connection, _Connection):
        connection.begin()
    body = _BodyLimit(request) if request.can_read_body else None
    try:
        return await handler(request)
    finally:
        if body is not None:
            body.end()
