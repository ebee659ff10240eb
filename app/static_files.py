"""The page itself and the folders that are served as they are."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from aiohttp import web

from app import frontend_management as frontend
from app import template_index
from app.paths import UnsafePath, inside
from app.responses import json_response

HELP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "web", "help")  # of our own nodes
_NEVER_KEPT = {"Cache-Control": "no-cache", "Pragma": "no-cache", "Expires": "0"}


def add_page(routes: web.RouteTableDef, server: Any) -> None:
    """`/`: the page, or how to install it; help of nodes; templates."""

    @routes.get("/")
    async def index(request: web.Request) -> web.StreamResponse:
        if server.web_root is None:
            return web.Response(text=frontend.MISSING_PAGE, content_type="text/html", headers=_NEVER_KEPT)
        return web.FileResponse(os.path.join(server.web_root, "index.html"), headers=_NEVER_KEPT)

    @routes.get("/docs/{name:.*}")
    async def node_help(request: web.Request) -> web.StreamResponse:
        for folder in filter(None, (HELP, frontend.docs_folder())):
            try:
                path = inside(folder, request.match_info["name"])
            except UnsafePath:
                break
            if os.path.isfile(path):
                return web.FileResponse(path)
        raise web.HTTPNotFound()

    index_of_templates = template_index.TemplateIndex()

    @routes.get("/templates/{name:.*}")
    async def template(request: web.Request) -> web.StreamResponse:
        import nodes

        name = request.match_info["name"]
        if template_index.file_of_index(name):
            memory = await asyncio.to_thread(template_index.memory_here)
            known = frozenset(nodes.NODE_CLASS_MAPPINGS)
            marked = await asyncio.to_thread(index_of_templates.marked, name, known, memory)
            if marked is not None:
                answer = json_response(marked)
                answer.headers.update(_NEVER_KEPT)
                return answer
        path = frontend.template_file(name)
        if path is None:
            raise web.HTTPNotFound()
        return web.FileResponse(path)


def add_static(app: web.Application, server: Any) -> None:
    """Web folders of node packs, and last of all the page's own files."""
    import nodes

    for name, folder in nodes.EXTENSION_WEB_DIRS.items():
        app.add_routes([web.static(f"/extensions/{name}", folder)])
    if server.web_root is not None:
        app.add_routes([web.static("/", server.web_root)])
