"""Routes the official page uses for itself; not under /api."""

from __future__ import annotations

import os
import shutil
from typing import Any

from aiohttp import web

import folder_paths
from app import logger
from app.responses import json_object, json_response


class TerminalService:
    """Sends new console lines to the pages that asked for them."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.subscriptions: set[str] = set()
        self._listening = False

    def subscribe(self, client_id: str) -> None:
        self.subscriptions.add(client_id)
        if not self._listening:
            logger.on_flush(self.send_messages)
            self._listening = True

    def unsubscribe(self, client_id: str) -> None:
        self.subscriptions.discard(client_id)

    def size(self) -> dict[str, int]:
        columns, rows = shutil.get_terminal_size()
        return {"cols": columns, "rows": rows}

    def send_messages(self, entries: list[dict[str, str]]) -> None:
        for client_id in sorted(self.subscriptions):
            if client_id in self.server.sockets:
                self.server.send_sync("logs", {"entries": entries, "size": self.size()}, client_id)
            else:
                self.subscriptions.discard(client_id)


def _newest_first(directory: str) -> list[str]:
    entries = [entry for entry in os.scandir(directory) if entry.is_file() and not entry.name.startswith(".")]
    return [entry.name for entry in sorted(entries, key=lambda entry: (-entry.stat().st_mtime, entry.name))]


def internal_routes(server: Any) -> web.RouteTableDef:
    """/internal/logs, /internal/folder_paths, /internal/files."""
    routes = web.RouteTableDef()
    terminal = TerminalService(server)

    @routes.get("/internal/logs")
    async def get_logs(request: web.Request) -> web.Response:
        return json_response("".join(f"{entry['t']} - {entry['m']}" for entry in logger.get_logs()))

    @routes.get("/internal/logs/raw")
    async def get_raw_logs(request: web.Request) -> web.Response:
        return json_response({"entries": logger.get_logs(), "size": terminal.size()})

    @routes.patch("/internal/logs/subscribe")
    async def subscribe(request: web.Request) -> web.Response:
        body = await json_object(request)
        client_id = str(body.get("clientId", ""))
        if body.get("enabled"):
            terminal.subscribe(client_id)
        else:
            terminal.unsubscribe(client_id)
        return web.Response()

    @routes.get("/internal/folder_paths")
    async def get_folder_paths(request: web.Request) -> web.Response:
        return json_response({kind: entry[0] for kind, entry in folder_paths.folder_names_and_paths.items()})

    @routes.get("/internal/files/{directory_type}")
    async def get_files(request: web.Request) -> web.Response:
        kind = request.match_info["directory_type"]
        directory = folder_paths.get_directory_by_type(kind)
        if directory is None:
            return json_response({"error": "Invalid directory type"}, 400)
        return json_response(_newest_first(directory) if os.path.isdir(directory) else [])

    return routes
