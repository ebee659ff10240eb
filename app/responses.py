"""JSON answers; values a node put there that JSON does not know are sent as text."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web


def dumps(value: Any) -> str:
    return json.dumps(value, default=str)


def json_response(value: Any, status: int = 200) -> web.Response:
    return web.json_response(value, status=status, dumps=dumps)


async def json_body(request: web.Request, required: bool = True) -> Any:
    """The request's JSON. Without a valid one: HTTPBadRequest, or {} when not `required`."""
    try:
        body = await request.json()
    except (ValueError, UnicodeDecodeError):
        if not required:
            return {}
        raise web.HTTPBadRequest(
            text=dumps({"error": {"type": "invalid_json", "message": "the request's body is not JSON",
                                  "details": "", "extra_info": {}}, "node_errors": {}}),
            content_type="application/json",
        ) from None
    return body
