"""Settings of the page, one JSON file per user."""

from __future__ import annotations

import json
import logging
import os
from typing import Any

from aiohttp import web

from app.responses import json_body, json_response

FILE = "comfy.settings.json"


class AppSettings:
    """Reads and writes `user/<user>/comfy.settings.json`."""

    def __init__(self, user_manager: Any) -> None:
        self.user_manager = user_manager

    def _path(self, request: web.Request) -> str:
        try:
            path = self.user_manager.get_request_user_filepath(request, FILE)
        except KeyError as error:
            raise web.HTTPUnauthorized(text=str(error)) from None
        assert path is not None
        return path

    def get_settings(self, request: web.Request) -> dict[str, Any]:
        """The user's settings; {} when there are none. HTTP 401 for an unknown user."""
        path = self._path(request)
        if not os.path.isfile(path):
            return {}
        try:
            with open(path, encoding="utf-8") as stream:
                return json.load(stream)
        except (OSError, ValueError) as error:
            logging.error("The user settings file %s is damaged (%s); starting with empty settings", path, error)
            return {}

    def save_settings(self, request: web.Request, settings: dict[str, Any]) -> None:
        """Replace the user's settings; the file is never half written."""
        path = self._path(request)
        fresh = path + ".new"
        with open(fresh, "w", encoding="utf-8") as stream:
            json.dump(settings, stream, indent=4)
        os.replace(fresh, path)

    def add_routes(self, routes: web.RouteTableDef) -> None:
        @routes.get("/settings")
        async def get_settings(request: web.Request) -> web.Response:
            return json_response(self.get_settings(request))

        @routes.get("/settings/{id}")
        async def get_setting(request: web.Request) -> web.Response:
            return json_response(self.get_settings(request).get(request.match_info["id"]))

        @routes.post("/settings")
        async def post_settings(request: web.Request) -> web.Response:
            settings = self.get_settings(request)
            new = await json_body(request)
            if not isinstance(new, dict):
                raise web.HTTPBadRequest(text="settings must be an object")
            self.save_settings(request, {**settings, **new})
            return web.Response()

        @routes.post("/settings/{id}")
        async def post_setting(request: web.Request) -> web.Response:
            settings = self.get_settings(request)
            settings[request.match_info["id"]] = await json_body(request)
            self.save_settings(request, settings)
            return web.Response()
