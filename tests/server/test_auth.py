"""The optional password: who gets in, who does not, and how guessing is slowed."""

from __future__ import annotations

import logging
import os

import pytest

import comfy.cli_args
from app import auth
from app.routes_info import _without_token

TOKEN = "a token with ümlauts"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def locked(serve, monkeypatch):
    """`locked(body)`: like `serve`, with a token."""

    def run(body):
        async def of_a_pack(request):
            raise AssertionError("the pack was asked")

        monkeypatch.setattr(comfy.cli_args.args, "auth_token", TOKEN)
        serve(body, before=lambda server: server.routes.get("/of_a_pack")(of_a_pack))

    return run


def test_nothing_is_answered_without_the_token(locked):
    async def body(api):
        for path in ("/prompt", "/api/prompt", "/object_info", "/of_a_pack", "/metrics", "/view?filename=x",
                     "/extensions/a.js", "/internal/logs", "/none", "/settings?token=" + TOKEN):  # fmt: skip
            for headers in ({}, {"Authorization": "Bearer"}, {"Authorization": f"Basic {TOKEN}"}):
                async with api.client.get(path, headers=headers) as answer:
                    assert answer.status == 401 and answer.headers["WWW-Authenticate"].startswith("Bearer"), (
                        path,
                        headers,
                    )
        assert await api.status("POST", "/prompt", json={}) == 401
        with pytest.raises(Exception, match="401"):
            await api.client.ws_connect("/ws")
        assert await api.status("GET", "/prompt", headers=BEARER) == 200
        async with api.client.ws_connect("/ws", headers=BEARER) as ws:
            assert (await ws.receive_json())["type"] == "status"

    locked(body)


def test_a_browser_logs_in_with_the_form(locked, caplog):
    async def body(api):
        page = {"Accept": "text/html,*/*"}
        async with api.client.get("/", headers=page, allow_redirects=False) as answer:
            assert answer.status == 303 and answer.headers["Location"] == auth.LOGIN
        async with api.client.get(auth.LOGIN) as answer:
            text = await answer.text()
            assert answer.status == 200 and '<form method="post"' in text and "<script" not in text
            assert answer.headers["Referrer-Policy"] != "no-referrer", "the form's Origin would be null"
        origin = {"Origin": f"http://{api.client.host}:{api.client.port}"}
        async with api.client.post(auth.LOGIN, data={"token": "wrong"}, headers=origin) as answer:
            assert answer.status == 403 and "not the token" in await answer.text()
        assert (
            await api.status("POST", auth.LOGIN, data={"token": TOKEN}, headers={"Origin": "http://evil.example"})
            == 403
        )
        async with api.client.post(auth.LOGIN, data={"token": TOKEN}, headers=origin, allow_redirects=False) as answer:
            assert answer.status == 303 and answer.headers["Location"] == "/"
            cookie = answer.headers["Set-Cookie"]
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and TOKEN not in cookie
        kept = {"Cookie": cookie.split(";")[0]}
        assert await api.status("GET", "/prompt", headers=kept) == 200
        async with api.client.ws_connect("/ws", headers=kept | origin) as ws:
            assert (await ws.receive_json())["type"] == "status"
        api.client.session.cookie_jar.clear()
        assert await api.status("GET", "/prompt", headers={"Cookie": kept["Cookie"][:-1] + "x"}) == 401
        async with api.client.get("/prompt", headers=kept) as answer:
            assert answer.status == 200

    caplog.set_level(logging.DEBUG)
    locked(body)
    assert "wrong token from" in caplog.text and TOKEN not in caplog.text


def test_the_form_is_read_for_strangers_only_so_far(locked):
    async def body(api):
        assert await api.status("POST", auth.LOGIN, data={"token": "x" * 100_000}) == 413
        for data in (b"", b"\xff\xfe", b"token", b"token=&token=", b"%%%&;="):
            assert await api.status("POST", auth.LOGIN, data=data) == 403, data

    locked(body)


def test_the_address_may_hold_the_token_once(locked):
    async def body(api):
        query = {"token": TOKEN, "a": "b"}
        async with api.client.get("/", params=query, allow_redirects=False) as answer:
            assert answer.status == 303 and answer.headers["Location"] == "/?a=b" and "Set-Cookie" in answer.headers
        api.client.session.cookie_jar.clear()
        async with api.client.get("/", params={"token": "no"}, allow_redirects=False) as answer:
            assert answer.status == 403 and "Set-Cookie" not in answer.headers

    locked(body)


def test_pictures_are_kept_by_the_browser_only(locked, folders):
    (folders / "output/a.png").write_bytes(b"x")

    async def body(api):
        async with api.client.get("/view.png", headers=BEARER) as answer:
            assert answer.headers["Cache-Control"].startswith("private")

    locked(body)


def test_guesses_are_slowed_by_address(locked):
    async def body(api):
        wrong = {"Authorization": "Bearer guess"}
        statuses = [await api.status("GET", "/prompt", headers=wrong) for _ in range(auth.FREE_ATTEMPTS + 1)]
        assert statuses == [401] * auth.FREE_ATTEMPTS + [429]
        async with api.client.post(auth.LOGIN, data={"token": "guess"}) as answer:
            assert answer.status == 429 and 0 < int(answer.headers["Retry-After"]) <= auth.LONGEST_WAIT_S

    locked(body)


def test_waits_grow_and_are_forgotten():
    now = [0.0]
    attempts = auth.Attempts(lambda: now[0])
    waits = []
    for _ in range(12):
        attempts.failed("192.0.2.1")
        waits.append(attempts.wait("192.0.2.1"))
    assert waits == [0, 0, 1, 2, 4, 8, 16, 30, 30, 30, 30, 30]
    assert attempts.wait("192.0.2.2") == 0
    now[0] = 29.0
    assert attempts.wait("192.0.2.1") == 1
    now[0] = auth.FORGOTTEN_S + 1
    assert attempts.wait("192.0.2.1") == 0
    for number in range(3):
        attempts.failed(f"2001:db8::{number}")
    assert attempts.wait("2001:db8::ffff") > 0 and attempts.wait("2001:db8:1::") == 0
    attempts.succeeded("2001:db8::9")
    assert attempts.wait("2001:db8::1") == 0


def test_addresses_are_forgotten_when_there_are_many(monkeypatch):
    monkeypatch.setattr(auth, "MOST_ADDRESSES", 5)
    attempts = auth.Attempts()
    for number in range(20):
        attempts.failed(f"192.0.2.{number}")
    assert len(attempts._failures) == 5


class Args:
    auth_token = None


def test_where_the_token_comes_from(caplog):
    args = Args()
    assert auth.chosen_token(args, {}) == "" and auth.chosen_token(args, {"TACO_TOKEN": " "}) == ""
    assert auth.chosen_token(args, {"TACO_TOKEN": " from the environment "}) == "from the environment"
    assert not caplog.messages
    args.auth_token = "from the command line"
    assert auth.chosen_token(args, {}) == "from the command line" and "set TACO_TOKEN instead" in caplog.text
    assert auth.chosen_token(args, {"TACO_TOKEN": "short"}) == "short" and "can be guessed" in caplog.text
    assert auth.authorization({"TACO_TOKEN": "t"}) == {"Authorization": "Bearer t"} and auth.authorization({}) == {}


def test_the_command_line_is_shown_without_the_token():
    shown = _without_token(["main.py", "--auth-token", "hush", "--auth-token=hush", "--cpu"])
    assert shown == ["main.py", "--auth-token", "...", "--auth-token=...", "--cpu"]


def test_the_key_of_cookies_is_kept_and_private(tmp_path, caplog):
    key = auth.page_key(str(tmp_path / "user"))
    assert len(key) == 32 and auth.page_key(str(tmp_path / "user")) == key
    assert os.stat(tmp_path / "user" / auth.KEY_FILE).st_mode & 0o077 == 0
    assert auth.TokenCheck("one", key).cookie != auth.TokenCheck("two", key).cookie
    (tmp_path / "file").write_text("")
    assert len(auth.page_key(str(tmp_path / "file"))) == 32 and "log in again" in caplog.text
