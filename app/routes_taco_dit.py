"""Routes of our own: /taco_dit/... and /metrics."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from app import first_workflow
from app.responses import json_object, json_response


def _panel(server: Any) -> Any:
    if server.panel is None:
        raise web.HTTPServiceUnavailable(text="the ranks of this process are not watched; start it with main.py")
    return server.panel


def add_routes(routes: web.RouteTableDef, server: Any) -> None:
    """/taco_dit/status, /taco_dit/watch, /taco_dit/events, /taco_dit/first_screen and /metrics."""

    @routes.get("/taco_dit/status")
    async def status(request: web.Request) -> web.Response:
        return json_response(server.taco_status())

    @routes.post("/taco_dit/watch")
    async def watch(request: web.Request) -> web.Response:
        body = await json_object(request)
        _panel(server).watch(str(body.get("clientId", "")), bool(body.get("enabled", True)))
        return json_response(server.taco_status())

    @routes.post("/taco_dit/events")
    async def events(request: web.Request) -> web.Response:
        body = await json_object(request)
        if body.get("clear"):
            _panel(server).clear_events()
        return web.Response()

    @routes.get("/taco_dit/first_screen")
    async def first_screen(request: web.Request) -> web.Response:
        return json_response({"graph": await asyncio.to_thread(first_workflow.first_graph)})

    @routes.get("/metrics")
    async def metrics(request: web.Request) -> web.Response:
        panel = _panel(server)
        return web.Response(body=panel.metrics.text(), headers={"Content-Type": panel.metrics.content_type})
