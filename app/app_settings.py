"""Settings of the page, one JSON file per user."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any

from aiohttp import web

from app.responses import json_body, json_object, json_response, storage_error
from utils import atomic_files, json_text

FILE = "comfy.settings.json"


class AppSettings:
    """Reads and writes `user/<user>/comfy.settings.json`."""

    def __init__(self, user_manager: Any) -> None:
        self.user_manager = user_manager
        self._changing = asyncio.Lock()

    def _path(self, request: web.Request) -> str:
        try:
            path = self.user_manager.get_request_user_filepath(request, FILE)
        except KeyError as error:
            raise web.HTTPUnauthorized(text=str(error)) from None
        if path is None:
            raise web.HTTPForbidden(text=f"{FILE} is a link out of the user's folder; put the file itself there")
        return path

    def get_settings(self, request: web.Request) -> dict[str, Any]:
        """The user's settings; {} when there are none. HTTP 401 for an unknown user."""
        path = self._path(request)
        if not os.path.isfile(path):
            return {}
        try:
            with open(path, encoding="utf-8") as stream:
                settings = json_text.loads(stream.read())
            if isinstance(settings, dict):
                return settings
            error: Exception = ValueError(f"it holds {type(settings).__name__}, not an object")
        except (OSError, ValueError) as damage:
            error = damage
        logging.error("The user settings file %s is damaged (%s); starting with empty settings", path, error)
        return {}

    def save_settings(self, request: web.Request, settings: dict[str, Any]) -> None:
        """Replace the user's settings; the file is never half written. Raises OSError, ValueError."""
        atomic_files.write(self._path(request), json_text.dumps(settings, indent=4))

    async def _change(self, request: web.Request, change: Callable[[dict[str, Any]], dict[str, Any]]) -> web.Response:
        """Read, change and write, one request at a time."""

        def work() -> None:
            self.save_settings(request, change(self.get_settings(request)))

        async with self._changing:
            try:
                await asyncio.to_thread(work)
            except OSError as error:
                raise storage_error(error, "the setting") from None
        return web.Response()

    def add_routes(self, routes: web.RouteTableDef) -> None:
        @routes.get("/settings")
        async def get_settings(request: web.Request) -> web.Response:
            return json_response(self.get_settings(request))

        @routes.get("/settings/{id}")
        async def get_setting(request: web.Request) -> web.Response:
            return json_response(self.get_settings(request).get(request.match_info["id"]))

        @routes.post("/settings")
        async def post_settings(request: web.Request) -> web.Response:
            self._path(request)
            new = await json_object(request)
            return await self._change(request, lambda settings: {**settings, **new})

        @routes.post("/settings/{id}")
        async def post_setting(request: web.Request) -> web.Response:
            self._path(request)
            value = await json_body(request)
            return await self._change(request, lambda settings: {**settings, request.match_info["id"]: value})
