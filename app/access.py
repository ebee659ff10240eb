"""Who may call: names this server answers to, and pages of which sites.

A page of another site can make a visitor's browser call this server in two ways. It names the server as it is, and the
browser then says in `Origin` (and `Sec-Fetch-Site`) whose page asks. Or its own name resolves to this machine's address
after the page was loaded (DNS rebinding): the browser takes it for the same site, but `Host` is that name, which is none
of ours. Nothing here asks DNS: a lookup in the event loop stops every other request while the name server is silent.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Middleware = Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]

ANY = "*"
_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}


def _split(authority: str) -> tuple[str | None, int | None]:
    """Lower-case name and port of `name:port`; (None, None) for what is neither."""
    try:
        parts = urlsplit("//" + authority)
        if parts.username is not None or parts.path or parts.query or parts.fragment:
            return None, None
        return (parts.hostname or "").rstrip(".") or None, parts.port
    except ValueError:
        return None, None


def is_address(name: str) -> bool:
    """Whether a host is an IP address rather than a name; a name server has no part in those."""
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True


def own_names(listen: str = "", hosts_file: str = "/etc/hosts") -> set[str]:
    """Names of this machine that need no name server: its host name, what its hosts file calls it, and those it listens on.

    Read once, at the start.
    """
    import psutil

    name = socket.gethostname().lower().rstrip(".")
    found = {"localhost", name, name.partition(".")[0], name.partition(".")[0] + ".local"}
    found |= {part.strip().lower() for part in listen.split(",") if part.strip() and not is_address(part.strip())}
    try:
        interfaces = psutil.net_if_addrs()
    except OSError as error:  # a container may forbid it
        logging.warning(
            "the addresses of this machine cannot be read (%s); its names are those of the host name", error
        )
        interfaces = {}
    addresses = {entry.address.partition("%")[0] for entries in interfaces.values() for entry in entries}
    if os.path.isfile(hosts_file):
        with open(hosts_file, encoding="utf-8", errors="replace") as file:
            for line in file:
                address, *names = line.partition("#")[0].split() or [""]
                if address in addresses or (is_address(address) and ipaddress.ip_address(address).is_loopback):
                    found |= {own.lower().rstrip(".") for own in names}
    return found - {"", ".local"}


class AllowedHosts:
    """Names in `Host` that are answered: IP addresses, `localhost` and names below it, and `names`; `*` is any."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = {name.strip().lower().rstrip(".") for name in names} - {""}

    def allow(self, authority: str) -> bool:
        name, _ = _split(authority)
        if ANY in self.names:
            return True
        return name is not None and (name in self.names or name.endswith(".localhost") or is_address(name))


def allowed_hosts(args: Any) -> AllowedHosts:
    """From --allowed-hosts and --listen."""
    return AllowedHosts([*own_names(args.listen), *(args.allowed_hosts or "").split(",")])


def same_site(origin: str, authority: str) -> bool:
    """Whether `Origin` names the server that `Host` names: the same host and port, the scheme's port where none is given."""
    scheme, separator, there = origin.lower().partition("://")
    if not separator or scheme not in _PORTS:
        return False
    theirs, ours = _split(there), _split(authority.lower())
    default = _PORTS[scheme]
    return theirs[0] is not None and (theirs[0], theirs[1] or default) == (ours[0], ours[1] or default)


def _refused(request: web.Request, reason: str) -> web.Response:
    logging.warning("%s %s refused (403): %s", request.method, request.rel_url.raw_path[:200], reason)
    return web.Response(status=403, text=reason)


def create_host_middleware(hosts: AllowedHosts) -> Middleware:
    """Refuse requests (403) whose `Host` is a name that is none of this server's."""

    @web.middleware
    async def known_host(request: web.Request, handler: Handler) -> web.StreamResponse:
        named = request.headers.getall("Host", [])
        if len(named) > 1:
            return web.Response(status=400, text="the request names several hosts")
        if named and not hosts.allow(named[0]):
            name = (_split(named[0])[0] or named[0])[:100]
            return _refused(
                request,
                f"this server does not know the host name {name!r}; if it is one of its names, start it with "
                f"--allowed-hosts {name if name.isprintable() else 'NAME'} (or open it by its IP address)",
            )
        return await handler(request)

    return known_host


def _from_another_site(request: web.Request) -> bool:
    """Whether the browser says that another site's page asks. Following a link to here is no harm."""
    if request.headers.get("Sec-Fetch-Site", "").lower() != "cross-site":
        return False
    follows_link = (
        request.headers.get("Sec-Fetch-Mode") == "navigate" and request.headers.get("Sec-Fetch-Dest") == "document"
    )
    return not (follows_link and request.method in ("GET", "HEAD"))


def create_origin_middleware() -> Middleware:
    """Refuse requests (403), WebSockets too, that a page of another site makes, as `Origin` or `Sec-Fetch-Site` say.

    Without this check any site could queue prompts here. Programs send neither header, or an `Origin` of their own host.
    """

    @web.middleware
    async def same_origin(request: web.Request, handler: Handler) -> web.StreamResponse:
        origin, host = request.headers.get("Origin"), request.headers.get("Host", "")
        if _from_another_site(request):
            return _refused(request, f"a page of another site asks {host[:100]}")
        if origin is not None and not same_site(origin, host):
            return _refused(
                request,
                f"a page of {origin[:100]} asks {host[:100]}; --enable-cors-header allows other sites, and a proxy must "
                "pass the Host header on",
            )
        if request.method == "OPTIONS":
            return web.Response()
        return await handler(request)

    return same_origin


def create_cors_middleware(allowed_origin: str) -> Middleware:
    """Let pages of `allowed_origin` (`*`: any) use the API; answers every OPTIONS request itself.

    Pages of other sites are refused (403) as without it.
    """

    @web.middleware
    async def cors(request: web.Request, handler: Handler) -> web.StreamResponse:
        origin = request.headers.get("Origin")
        if origin is not None and allowed_origin != ANY:
            same = origin.rstrip("/").lower() == allowed_origin.rstrip("/").lower()
            if not same and not same_site(origin, request.headers.get("Host", "")):
                return _refused(request, f"a page of {origin[:100]} asks; --enable-cors-header allows {allowed_origin}")
        response = web.Response() if request.method == "OPTIONS" else await handler(request)
        if response.prepared:  # a WebSocket
            return response
        response.headers["Access-Control-Allow-Origin"] = allowed_origin
        response.headers["Access-Control-Allow-Methods"] = "POST, GET, DELETE, PUT, OPTIONS, PATCH"
        response.headers["Access-Control-Allow-Headers"] = "Content-Type, Authorization"
        response.headers["Access-Control-Allow-Credentials"] = "true"
        return response

    return cors
