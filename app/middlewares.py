"""What every request passes: caching rules, compression, and who may call from another site."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from aiohttp import web

from app.responses import json_response

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Middleware = Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]

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


@web.middleware
async def cache_control(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Scripts are always asked for again, pictures kept for a day; a header that is there already stays."""
    response = await handler(request)
    rule = _cache_rule(request.path, response.status)
    if rule is not None and "Cache-Control" not in response.headers:
        response.headers["Cache-Control"] = rule
    return response


@web.middleware
async def compress_body(request: web.Request, handler: Handler) -> web.StreamResponse:
    """gzip for JSON and text, where the client takes it."""
    response = await handler(request)
    accepted = request.headers.get("Accept-Encoding", "")
    fits = isinstance(response, web.Response) and response.content_type in _COMPRESSIBLE and response.body is not None
    if fits and "gzip" in accepted:
        response.enable_compression()
    return response


def create_cors_middleware(allowed_origin: str) -> Middleware:
    """Let pages of `allowed_origin` (`*`: any) use the API; answers every OPTIONS request itself."""

    @web.middleware
    async def cors(request: web.Request, handler: Handler) -> web.StreamResponse:
        response = web.Response() if request.method == "OPTIONS" else await handler(request)
        response.headers["Access-Control-Allow-Origin"] = allowed_origin
        response.headers["Access-Control-Allow-Methods"] = "POST, GET, DELETE, PUT, OPTIONS, PATCH"
        response.headers["Access-Control-Allow-Headers"] = "Content-Type, Authorization"
        response.headers["Access-Control-Allow-Credentials"] = "true"
        return response

    return cors


def is_loopback(host: str | None) -> bool:
    """Whether a host name or address means this machine."""
    if host is None:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    found = False
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            entries = socket.getaddrinfo(host, None, family)
        except OSError:
            continue
        if not all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in entries):
            return False
        found = found or bool(entries)
    return found


def _split(authority: str) -> tuple[str | None, int | None]:
    try:
        parts = urlsplit("//" + authority)
        return parts.hostname, parts.port
    except ValueError:
        return None, None


def _from_another_site(request: web.Request) -> bool:
    """Whether the browser says that another site's page asks. Following a link to here is no harm."""
    if request.headers.get("Sec-Fetch-Site", "").lower() != "cross-site":
        return False
    follows_link = (
        request.headers.get("Sec-Fetch-Mode") == "navigate" and request.headers.get("Sec-Fetch-Dest") == "document"
    )
    return not (follows_link and request.method in ("GET", "HEAD"))


def create_origin_only_middleware() -> Middleware:
    """Refuse requests that a page of another site makes (403): any, as far as the browser says so with
    Sec-Fetch-Site, and those to this machine's loopback address by their Origin.

    Without this check any site could queue prompts here.
    """

    @web.middleware
    async def same_origin(request: web.Request, handler: Handler) -> web.StreamResponse:
        host, origin = request.headers.get("Host"), request.headers.get("Origin")
        if _from_another_site(request):
            logging.warning("request from another site to %s refused (403)", host)
            return web.Response(status=403)
        if host and origin:
            here, there = _split(host), _split(urlsplit(origin).netloc.lower())
            if is_loopback(here[0]) and there[0]:
                # a port is compared only when both name one
                differs = here[0] != there[0] or (None not in (here[1], there[1]) and here[1] != there[1])
                if differs:
                    logging.warning("request from %s to %s refused (403): other site", origin, host)
                    return web.Response(status=403)
        if request.method == "OPTIONS":
            return web.Response()
        return await handler(request)

    return same_origin
