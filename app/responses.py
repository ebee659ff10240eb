"""JSON answers; values a node put there that JSON does not know are sent as text."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web


def dumps(value: Any) -> str:
    return json.dumps(value, default=str)


def json_response(value: Any, status: int = 200) -> web.Response:
    return web.json_response(value, status=status, dumps=dumps)


def bad_request(kind: str, message: str) -> web.HTTPBadRequest:
    """A 400 to raise, in the form of an error report of /prompt."""
    error = {"type": kind, "message": message, "details": "", "extra_info": {}}
    return web.HTTPBadRequest(text=dumps({"error": error, "node_errors": {}}), content_type="application/json")


async def json_body(request: web.Request, required: bool = True) -> Any:
    """The request's JSON. Without a valid one: HTTPBadRequest, or {} when not `required`."""
    try:
        return await request.json()
    except (ValueError, RecursionError, LookupError):  # not JSON, nested too deeply, or of an unknown charset
        if not required:
            return {}
        raise bad_request("invalid_json", "the request's body is not JSON") from None


async def json_object(request: web.Request) -> dict[str, Any]:
    """The request's JSON, which must be an object: HTTPBadRequest otherwise."""
    body = await json_body(request)
    if not isinstance(body, dict):
        raise bad_request("invalid_json", f"the request's body must be a JSON object, not {type(body).__name__}")
    return body


def listed(body: dict[str, Any], key: str) -> list[Any]:
    """A list in a request's JSON, empty when it is not there; HTTPBadRequest when it is something else."""
    value = body.get(key) or []
    if not isinstance(value, list):
        raise bad_request("invalid_json", f"{key} must be a list, not {type(value).__name__}")
    return value
