"""What every answer passes: caching rules, compression, and the form of errors."""

from __future__ import annotations

import logging

from aiohttp import web

from app.access import Handler, Middleware
from app.responses import json_response

_PICTURES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_HOUR = 3600
_KEPT = {*range(200, 207), 301, 308}
_COMPRESSIBLE = ("application/json", "text/plain")


def _cache_rule(path: str, status: int) -> str | None:
    path = path.lower()
    name = path.rsplit("/", 1)[-1]
    if path.endswith((".js", ".css")) or (name.startswith("index") and name.endswith(".json")):
        return "no-cache"
    if not path.endswith(_PICTURES):
        return None
    if status == 404:
        return f"public, max-age={_HOUR}"
    if status in _KEPT:
        return f"public, max-age={24 * _HOUR}"
    return "no-cache" if status in (302, 303, 307) else None


@web.middleware
async def clear_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What a handler did not expect is logged, and told to the client as JSON."""
    try:
        return await handler(request)
    except (web.HTTPException, ConnectionError):
        raise
    except Exception as error:  # noqa: BLE001 - routes of node packs may raise anything
        logging.exception("%s %s failed", request.method, request.path)
        message = f"{type(error).__name__}: {error}"
        report = {"type": "internal_error", "message": message, "details": request.path, "extra_info": {}}
        return json_response({"error": report, "node_errors": {}}, 500)


def create_cache_middleware(private: bool) -> Middleware:
    """Scripts are always asked for again, pictures kept for a day; a header that is there already stays.

    `private`: only the browser itself may keep them, no proxy that would give them to others.
    """

    @web.middleware
    async def cache_control(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        rule = _cache_rule(request.path, response.status)
        if rule is not None and "Cache-Control" not in response.headers:
            response.headers["Cache-Control"] = rule.replace("public", "private") if private else rule
        return response

    return cache_control


@web.middleware
async def compress_body(request: web.Request, handler: Handler) -> web.StreamResponse:
    """gzip for JSON and text, where the client takes it."""
    response = await handler(request)
    accepted = request.headers.get("Accept-Encoding", "")
    fits = isinstance(response, web.Response) and response.content_type in _COMPRESSIBLE and response.body is not None
    if fits and "gzip" in accepted:
        response.enable_compression()
    return response
