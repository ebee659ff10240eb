"""The optional password: with TACO_TOKEN (or --auth-token) every request needs it, whatever the route.

Programs send `Authorization: Bearer TOKEN`. A browser gets a cookie, from a small form or from `/?token=TOKEN`. The cookie
does not hold the token but a value made from it with a random key in the user folder, so that it survives restarts,
ends when the token changes, and cannot be guessed from guesses of the token. Attempts with a wrong token are slowed.
"""

from __future__ import annotations

import collections
import hashlib
import hmac
import html
import ipaddress
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl

from aiohttp import web

from app.access import Handler, Middleware
from app.responses import json_response
from utils import atomic_files

VARIABLE = "TACO_TOKEN"
LOGIN = "/taco_dit/login"
KEY_FILE = "auth_key"
SHORT = 12  # fewer characters can be guessed
LONGEST_FORM = 16 * 1024  # bytes, of somebody who may not have the token
COOKIE_S = 90 * 24 * 3600
FREE_ATTEMPTS = 3
LONGEST_WAIT_S = 30.0
FORGOTTEN_S = 600.0
MOST_ADDRESSES = 10_000

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>TACO-DiT</title>
<meta name="viewport" content="width=device-width, initial-scale=1"></head>
<body style="font-family: sans-serif; max-width: 24em; margin: 15vh auto; padding: 0 1em">
<h1>TACO-DiT</h1><p>This server needs its token, the value of TACO_TOKEN it was started with.</p>
<form method="post" action="{action}"><p><label>Token<br>
<input type="password" name="token" autocomplete="current-password" autofocus required style="width: 100%"></label></p>
<p><button>Open</button></p></form><p role="alert">{message}</p></body></html>
"""
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


def chosen_token(args: Any, environ: Mapping[str, str]) -> str:
    """The token in force, "" for none; TACO_TOKEN goes before --auth-token. Warns of tokens that others can read or guess."""
    token = environ.get(VARIABLE, "").strip()
    if args.auth_token and not token:
        logging.warning(
            "--auth-token can be read by other users of this machine in the list of processes; set %s instead", VARIABLE
        )
        token = args.auth_token.strip()
    if token and len(token) < SHORT:
        logging.warning("the token has fewer than %d characters and can be guessed; use a longer one", SHORT)
    return token


def authorization(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Headers with which a program of ours calls a server that was started with the same environment."""
    token = environ.get(VARIABLE, "").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


class Attempts:
    """Wrong tokens by address: after a few, the next may be tried only after 1 s, 2 s, 4 s, ... 30 s."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: collections.OrderedDict[str, tuple[int, float]] = collections.OrderedDict()

    @staticmethod
    def _network(address: str) -> str:
        """One entry for an IPv6 network, whose owner has all its addresses."""
        try:
            found = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return address
        return str(ipaddress.ip_network((found, 64), strict=False)) if found.version == 6 else str(found)

    def wait(self, address: str) -> float:
        """Seconds until this address may try again; 0 at once."""
        count, last = self._failures.get(self._network(address), (0, 0.0))
        passed = self._clock() - last
        if count < FREE_ATTEMPTS or passed > FORGOTTEN_S:
            return 0.0
        return max(0.0, min(LONGEST_WAIT_S, 2.0 ** min(count - FREE_ATTEMPTS, 10)) - passed)

    def failed(self, address: str) -> None:
        key, now = self._network(address), self._clock()
        count, last = self._failures.pop(key, (0, now))
        self._failures[key] = (1 if now - last > FORGOTTEN_S else count + 1, now)
        while len(self._failures) > MOST_ADDRESSES:
            self._failures.popitem(last=False)

    def succeeded(self, address: str) -> None:
        self._failures.pop(self._network(address), None)


def page_key(folder: str) -> bytes:
    """The random key of this server's cookies, kept in the user folder where only its owner can read it."""
    path = os.path.join(folder, KEY_FILE)
    try:
        with open(path, "rb") as file:
            key = file.read()
        if len(key) >= 32:
            return key
    except FileNotFoundError:
        pass
    except OSError as error:
        logging.warning("%s cannot be read (%s); pages log in again after a restart", path, error)
        return secrets.token_bytes(32)
    key = secrets.token_bytes(32)
    try:
        os.makedirs(folder, exist_ok=True)
        atomic_files.write(path, key, mode=0o600)
    except OSError as error:
        logging.warning("%s cannot be written (%s); pages log in again after a restart", path, error)
    return key


class TokenCheck:
    """Lets requests pass that know the token, and gives browsers their cookie."""

    def __init__(self, token: str, key: bytes, attempts: Attempts | None = None) -> None:
        self._token = token.encode("utf-8", "surrogateescape")
        made = hmac.new(key, self._token, hashlib.sha256).hexdigest()
        # servers on other ports of this host share its cookies, so each has a name of its own
        self.cookie, self._cookie_value = f"taco_dit_{made[:8]}", made[8:]
        self._attempts = attempts or Attempts()

    def _is_token(self, request: web.Request, given: str) -> bool:
        """Check a token; HTTP 429 when this address tried too many wrong ones."""
        address = request.remote or ""
        wait = math.ceil(self._attempts.wait(address))
        if wait:
            text = f"too many wrong tokens from this address; try again in {wait} s"
            raise web.HTTPTooManyRequests(text=text, headers={"Retry-After": str(wait)})
        if hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self._token):
            self._attempts.succeeded(address)
            return True
        self._attempts.failed(address)
        logging.warning("wrong token from %s", address)
        return False

    def knows(self, request: web.Request) -> bool:
        """Whether a request carries the cookie or the token. HTTP 429 when it has to wait."""
        cookie = request.cookies.get(self.cookie, "").encode("utf-8", "surrogateescape")
        if hmac.compare_digest(cookie, self._cookie_value.encode()):
            return True
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        return scheme.lower() == "bearer" and bool(given.strip()) and self._is_token(request, given)

    def _let_in(self, request: web.Request, target: str) -> web.Response:
        answer = web.Response(status=303, headers={"Location": target, **_HEADERS})
        answer.set_cookie(
            self.cookie, self._cookie_value, max_age=COOKIE_S, path="/", httponly=True, samesite="Strict",
            secure=request.secure or request.headers.get("X-Forwarded-Proto", "") == "https",
        )  # fmt: skip
        return answer

    async def login(self, request: web.Request) -> web.Response:
        """The form, and what it sends."""
        if request.method != "POST":
            return _form("")
        content = bytearray()
        while part := await request.content.readany():
            content += part
            if len(content) > LONGEST_FORM:
                raise web.HTTPRequestEntityTooLarge(LONGEST_FORM, len(content))
        given = dict(parse_qsl(content.decode("utf-8", "replace"))).get("token", "")
        if given and self._is_token(request, given):
            return self._let_in(request, "/")
        return _form("This is not the token.", 403)

    async def answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The middleware."""
        if request.path == LOGIN and request.method in ("GET", "HEAD", "POST"):
            return await self.login(request)
        if request.path == "/" and request.method == "GET" and "token" in request.query:
            if not self._is_token(request, request.query["token"]):
                return _form("The token in the address is not this server's.", 403)
            rest = request.rel_url.without_query_params("token")
            return self._let_in(request, str(rest) if str(rest).startswith("/?") else "/")
        if self.knows(request):
            return await handler(request)
        if request.method in ("GET", "HEAD") and "text/html" in request.headers.get("Accept", ""):
            return web.Response(status=303, headers={"Location": LOGIN, **_HEADERS})
        message = f"this server needs its token: send 'Authorization: Bearer TOKEN', or open {LOGIN} in a browser"
        report = {"type": "unauthorized", "message": message, "details": "", "extra_info": {}}
        answer = json_response({"error": report, "node_errors": {}}, 401)
        answer.headers["WWW-Authenticate"] = 'Bearer realm="TACO-DiT"'
        return answer


def _form(message: str, status: int = 200) -> web.Response:
    page = _PAGE.format(action=LOGIN, message=html.escape(message))
    return web.Response(text=page, status=status, content_type="text/html", headers=_HEADERS)


def create_token_middleware(check: TokenCheck) -> Middleware:
    """Refuse (401) every request without the token; a browser is sent to the form."""

    @web.middleware
    async def with_token(request: web.Request, handler: Handler) -> web.StreamResponse:
        return await check.answer(request, handler)

    return with_token
