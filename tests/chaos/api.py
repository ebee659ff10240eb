"""HTTP calls to the server. A server that is away is an exception of its own, because it is often expected."""

from __future__ import annotations

import json
from typing import Any

import aiohttp

CALL_S = 30.0


class Away(Exception):
    """The server could not be reached, or did not answer in time. `sent`: whether it may have got the request."""

    def __init__(self, message: str, sent: bool = True) -> None:
        super().__init__(message)
        self.sent = sent


class Api:
    """Calls to one port. Each has a connection of its own: one kept open would fail after a restart for no fault."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True, limit=0))

    async def close(self) -> None:
        """Close the connections."""
        await self.session.close()

    async def call(self, method: str, path: str, body: Any = None, timeout: float = CALL_S) -> tuple[int, bytes]:
        """(status, content). `body` is sent as JSON, or as it is when it is a form. Raises Away."""
        content = {"data": body} if isinstance(body, aiohttp.FormData) else {} if body is None else {"json": body}
        limit = aiohttp.ClientTimeout(total=timeout)
        try:
            async with self.session.request(method, self.url + path, timeout=limit, **content) as answer:
                return answer.status, await answer.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            sent = not isinstance(error, aiohttp.ClientConnectorError)
            raise Away(f"{method} {path}: {type(error).__name__}: {error}", sent) from error

    async def get(self, path: str, timeout: float = CALL_S) -> Any:
        """JSON of an answer 200. Raises Away; RuntimeError for another status."""
        status, content = await self.call("GET", path, timeout=timeout)
        if status != 200:
            raise RuntimeError(f"GET {path}: {status} {content[:300]!r}")
        return json.loads(content)

    async def post(self, path: str, body: Any) -> None:
        """POST that must be answered 200. Raises Away; RuntimeError for another status."""
        status, content = await self.call("POST", path, body)
        if status != 200:
            raise RuntimeError(f"POST {path}: {status} {content[:300]!r}")
