"""Names the server answers to, and pages of which sites may call it."""

from __future__ import annotations

import ast
import glob
import os
import socket

import pytest
from test_security import ROOT, raw

from app.access import AllowedHosts, own_names, same_site

UPGRADE = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
           "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}  # fmt: skip


@pytest.mark.parametrize("authority", [
    "localhost", "localhost:8188", "LOCALHOST.", "sub.localhost", "127.0.0.1:1", "[::1]:8188", "10.0.0.7",
    "[fe80::1%25eth0]:80", "mine", "mine.example:443",
])  # fmt: skip
def test_hosts_that_are_answered(authority):
    assert AllowedHosts(["localhost", "Mine", " mine.example."]).allow(authority)


@pytest.mark.parametrize("authority", [
    "evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "notlocalhost", "evil@127.0.0.1", "", ":80", "[::1",
    "a:b", "mine/", "1.2.3",
])  # fmt: skip
def test_hosts_that_are_not(authority):
    assert not AllowedHosts(["localhost", "mine"]).allow(authority)
    assert AllowedHosts(["*"]).allow(authority)


def test_this_machines_names(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "Big.lab.example")
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost box # comment words\n::1 six\n203.0.113.9 other\nnonsense line\n\n# all\n")
    names = own_names("0.0.0.0, ::, draw.example", str(hosts))
    assert names == {"localhost", "big", "big.lab.example", "big.local", "box", "six", "draw.example"}


@pytest.mark.parametrize("origin, host, same", [
    ("http://a:8188", "a:8188", True), ("http://A", "a:80", True), ("https://a", "a", True), ("https://a:443", "a", True),
    ("http://[::1]:8188", "[::1]:8188", True), ("https://a", "a:80", False), ("http://a", "a:8188", False),
    ("http://b:8188", "a:8188", False), ("null", "a", False), ("file://", "a", False), ("http://", "", False),
    ("http://a@b", "b", False), ("http://a/x", "a", False), ("chrome-extension://a", "a", False), ("a", "a", False),
    ("http://a:99999", "a", False),
])  # fmt: skip
def test_origin_is_compared_with_host(origin, host, same):
    assert same_site(origin, host) is same


def test_foreign_names_and_sites_are_refused_also_for_websockets(serve, flags):
    flags(allowed_hosts="draw.example, other.example")

    async def body(api):
        port = api.client.port
        for headers, expected in (
            ({"Host": "evil.example"}, 403), ({"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"}, 403),
            ({"Host": "draw.example"}, 200), ({"Host": "draw.example", "Origin": "https://draw.example"}, 200),
            ({"Host": "OTHER.example:99", "Origin": "http://other.example:99"}, 200),
            ({"Host": "10.1.2.3:8188", "Origin": "http://evil.example:8188"}, 403), ({"Origin": "null"}, 403),
            ({"Host": "draw.example", "Origin": "https://other.example"}, 403),
        ):  # fmt: skip
            status, content = await request(api, "/prompt", **headers)
            assert status == expected, headers
            if status == 403 and "evil" in headers.get("Host", ""):
                assert b"--allowed-hosts evil.example" in content
            status, _ = await request(api, "/ws", **UPGRADE | headers)
            assert status == (101 if expected == 200 else 403), headers

    serve(body)


async def request(api, path, **headers):
    """(status, content) of a GET with exactly these headers, and a Host if there is none."""
    import asyncio

    reader, writer = await asyncio.open_connection(api.client.host, api.client.port)
    headers.setdefault("Host", f"{api.client.host}:{api.client.port}")
    headers.setdefault("Connection", "close")
    writer.write(
        f"GET {path} HTTP/1.1\r\n".encode() + "".join(f"{k}: {v}\r\n" for k, v in headers.items()).encode() + b"\r\n"
    )
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split()[1])
    content = await reader.read() if headers["Connection"] == "close" else b""
    writer.close()
    return status, content


def test_any_name_with_a_star(serve, flags):
    flags(allowed_hosts="*")

    async def body(api):
        assert (await request(api, "/prompt", Host="whatever.example"))[0] == 200

    serve(body)


def test_cross_origin_is_for_the_site_that_was_named(serve, flags):
    flags(enable_cors_header="https://friend.example")

    async def body(api):
        own = f"http://{api.client.host}:{api.client.port}"
        for origin, expected in (
            ("https://friend.example", 200),
            (own, 200),
            ("https://evil.example", 403),
            ("null", 403),
        ):
            assert (await request(api, "/prompt", Origin=origin))[0] == expected, origin
            assert (await request(api, "/ws", Origin=origin, **UPGRADE))[0] == (101 if expected == 200 else 403), origin
        assert (await request(api, "/prompt", Host="evil.example", Origin="https://friend.example"))[0] == 403

    serve(body)


def test_no_request_asks_a_name_server(serve, monkeypatch):
    def asked(*arguments, **keywords):
        raise AssertionError(f"a lookup of {arguments}")

    async def body(api):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("getaddrinfo", "gethostbyname", "gethostbyaddr", "getfqdn", "getnameinfo"):
                patch.setattr(socket, name, asked)
            status, _ = await raw(api, "GET", "/prompt", Origin="http://slow.example:1")
            assert status == 403

    serve(body)


def test_no_file_of_the_server_looks_names_up():
    paths = {os.path.join(ROOT, "server.py"), *glob.glob(os.path.join(ROOT, "app", "*.py"))}
    paths.remove(os.path.join(ROOT, "app", "start_checks.py"))  # it runs before there is a server
    lookups = {"getaddrinfo", "gethostbyname", "gethostbyname_ex", "gethostbyaddr", "getfqdn"}
    for path in paths:
        with open(path, encoding="utf-8") as file:
            used = {node.attr for node in ast.walk(ast.parse(file.read())) if isinstance(node, ast.Attribute)}
        assert not used & lookups, path
