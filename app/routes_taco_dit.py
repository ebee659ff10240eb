"""Routes of our own: /taco_dit/... and /metrics."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from app import first_workflow
from app.responses import bad_request, json_object, json_response
from app.template_index import lacking_text, words_for
from app.template_requirements import missing_of


def _panel(server: Any) -> Any:
    if server.panel is None:
        raise web.HTTPServiceUnavailable(text="the ranks of this process are not watched; start it with main.py")
    return server.panel


def add_routes(routes: web.RouteTableDef, server: Any) -> None:
    """/taco_dit/status, /taco_dit/watch, /taco_dit/events, /taco_dit/first_screen, /taco_dit/missing and /metrics."""

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

    @routes.post("/taco_dit/missing")
    async def missing(request: web.Request) -> web.Response:
        import nodes

        body = await json_object(request)
        language = str(body.get("language", ""))
        try:
            found = missing_of(body.get("workflow") or {}, nodes.NODE_CLASS_MAPPINGS, official=False)
        except (AttributeError, KeyError, TypeError) as error:
            raise bad_request("invalid_workflow", f"this is not a workflow as the page saves it: {error!r}") from None
        return json_response({"missing": found, "text": lacking_text(found, words_for(language))})

    @routes.get("/metrics")
    async def metrics(request: web.Request) -> web.Response:
        panel = _panel(server)
        return web.Response(body=panel.metrics.text(), headers={"Content-Type": panel.metrics.content_type})
