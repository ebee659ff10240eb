"""A page that does not read its messages delays nobody, and what waits for it is bounded."""

from __future__ import annotations

import asyncio
import json
import time

from PIL import Image

import app.pages
from comfy_execution.message_types import BinaryEventTypes


async def deaf_page(api, sid):
    """A WebSocket that is opened and never read from."""
    url = api.client.make_url("/ws")
    reader, writer = await asyncio.open_connection(url.host, url.port, limit=1024)
    writer.transport.pause_reading()
    writer.write(
        f"GET /ws?clientId={sid} HTTP/1.1\r\nHost: {url.host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    while sid not in api.server.sockets:
        await asyncio.sleep(0.01)
    return reader, writer


async def until(ws, kind):
    """The first message of a kind."""
    while True:
        message = await ws.receive(timeout=10)
        if isinstance(message.data, str) and json.loads(message.data)["type"] == kind:
            return json.loads(message.data)["data"]


def test_others_are_not_delayed(serve):
    async def body(api):
        _, writer = await deaf_page(api, "deaf")
        async with api.client.ws_connect("/ws?clientId=reads") as ws:
            await until(ws, "status")
            for i in range(40):
                api.server.send_sync("much", "x" * 500_000 if i < 39 else "last")
            begun = time.monotonic()
            while await until(ws, "much") != "last":
                pass
            assert time.monotonic() - begun < 5
        assert "deaf" in api.server.sockets
        writer.transport.abort()

    serve(body)


def test_a_page_too_far_behind_is_closed(serve, monkeypatch):
    monkeypatch.setattr(app.pages, "MAX_BYTES", 2_000_000)
    monkeypatch.setattr(app.pages, "CLOSE_S", 0.2)

    async def body(api):
        reader, writer = await deaf_page(api, "deaf")
        for _ in range(60):
            api.server.send_sync("much", "x" * 500_000, "deaf")
        for _ in range(300):
            await asyncio.sleep(0.01)
            if "deaf" not in api.server.sockets:
                break
        assert "deaf" not in api.server.sockets and not api.server._pages
        writer.transport.abort()

    serve(body)


def test_the_close_code_says_why(serve, monkeypatch):
    """A page that begins to read again in time is told."""
    monkeypatch.setattr(app.pages, "MAX_MESSAGES", 5)

    async def body(api):
        async with api.client.ws_connect("/ws?clientId=slow") as ws:
            await until(ws, "status")
            for i in range(20):
                await api.server.send("many", i, "slow")
            while not ws.closed:
                await ws.receive(timeout=10)
            assert ws.close_code == app.pages.TOO_FAR_BEHIND

    serve(body)


def test_only_the_latest_preview_waits(serve):
    async def body(api):
        async with api.client.ws_connect("/ws?clientId=slow") as ws:
            await until(ws, "status")
            queue = api.server._pages["slow"]
            for shade in range(5):
                queue.put(bytes([shade]) * 100, "preview")
                queue.put(str(shade))
            assert queue._bytes == 105
            assert [m.data for m in [await ws.receive() for _ in range(6)]] == ["0", "1", "2", "3", b"\4" * 100, "4"]

    serve(body)


def test_pictures_sent_as_results_all_arrive(serve):
    async def body(api):
        async with api.client.ws_connect("/ws?clientId=slow") as ws:
            await until(ws, "status")
            for kind in ("PNG", "PNG", "PNG"):
                picture = (kind, Image.new("RGB", (8, 8)), None)
                await api.server.send(BinaryEventTypes.UNENCODED_PREVIEW_IMAGE, picture, "slow")
            assert [len((await ws.receive(timeout=5)).data) > 8 for _ in range(3)] == [True] * 3

    serve(body)
