"""JSON answers and bodies, and the answers to what cannot be done."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from utils.atomic_files import is_disk_full
from utils.json_text import dumps, loads

MAX_JSON = 32 * 2**20  # bytes of JSON; the event loop reads it in one piece, which takes about 20 ms per MiB


def json_response(value: Any, status: int = 200, infinity: float | None = None) -> web.Response:
    """An answer that JSON.parse takes: see `json_text.dumps`."""
    return web.json_response(text=dumps(value, infinity), status=status)


def bad_request(kind: str, message: str) -> web.HTTPBadRequest:
    """A 400 to raise, in the form of an error report of /prompt."""
    error = {"type": kind, "message": message, "details": "", "extra_info": {}}
    return web.HTTPBadRequest(text=dumps({"error": error, "node_errors": {}}), content_type="application/json")


async def json_body(request: web.Request, required: bool = True) -> Any:
    """The request's JSON. Without a valid one: HTTPBadRequest, or {} when not `required`; HTTP 413 above MAX_JSON."""
    if (request.content_length or 0) > MAX_JSON or len(await request.read()) > MAX_JSON:
        raise web.HTTPRequestEntityTooLarge(MAX_JSON, request.content_length or MAX_JSON)
    try:
        return await request.json(loads=loads)
    except (ValueError, LookupError) as error:  # not JSON, or of an unknown charset
        if not required:
            return {}
        raise bad_request("invalid_json", f"the request's body is not JSON: {str(error)[:200]}") from None


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


def storage_error(error: OSError, what: str) -> web.HTTPException:
    """The answer to raise when a file cannot be written: 507 for a full disk, else 400."""
    if is_disk_full(error):
        text = f"{what} was not stored: the server's disk is full ({error.strerror}); free some space and send it again"
        return web.HTTPInsufficientStorage(text=text)
    return web.HTTPBadRequest(text=f"{what} cannot be stored: {error.strerror or error}")
