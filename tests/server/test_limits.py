"""Requests that are half sent, uploads to a full disk and at the same time, settings that are damaged."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os

import aiohttp
import pytest
from aiohttp import web
from PIL import Image
from test_files import form, png

import app.connections
from utils import atomic_files


@pytest.fixture
def listening(serve, monkeypatch):
    """`listening(body)`: like `serve`, `body(api, host, port)` for a port with the real limits, but short ones."""
    monkeypatch.setattr(app.connections, "HEADERS_S", 0.5)
    monkeypatch.setattr(app.connections, "BODY_S", 0.5)

    def run(body):
        async def main(api):
            runner = app.connections.Runner(api.server.app, access_log=None)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            try:
                await body(api, *site._server.sockets[0].getsockname())
            finally:
                await runner.cleanup()

        serve(main)

    return run


async def ended(reader):
    """All that arrives until the server closes the connection."""
    return await asyncio.wait_for(reader.read(), 20)


HEAD = "Host: 127.0.0.1\r\nContent-Length: {}\r\n\r\n"


def test_connections_without_the_end_of_their_headers_are_closed(listening):
    async def body(api, host, port):
        for sent in (b"", b"GET /prompt HT", b"GET /prompt HTTP/1.1\r\nHost: 127.0.0.1\r\n"):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(sent)
            assert await ended(reader) == b"", sent
            writer.close()
        # also after a request that was whole
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"GET /prompt HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        await reader.readuntil(b"}}")
        writer.write(b"GET /prompt HTTP/1.1\r\nHo")
        assert await ended(reader) == b""
        writer.close()

    listening(body)


def test_a_body_that_stops_is_given_up(listening):
    async def body(api, host, port):
        for path in ("/prompt", "/settings", "/upload/image", "/userdata/half.txt"):
            reader, writer = await asyncio.open_connection(host, port)
            kind = "Content-Type: multipart/form-data; boundary=x\r\n" if "upload" in path else ""
            start = '--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\nhalf' if kind else "{"
            writer.write(f"POST {path} HTTP/1.1\r\n{kind}{HEAD.format(1000)}{start}".encode())
            answer = await ended(reader)
            assert answer.startswith(b"HTTP/1.1 408") and b"no part of the request's body arrived" in answer, path
            writer.close()

    listening(body)


def test_a_slow_body_that_goes_on_is_not_given_up(monkeypatch):
    """The check is called by hand, so that it does not depend on how fast the machine is."""
    errors = []

    class Transport:
        reading = True

        def is_reading(self):
            return self.reading

    class Request:
        transport = Transport()

        class content:  # noqa: N801
            total_bytes = 0
            is_eof = staticmethod(lambda: False)
            set_exception = staticmethod(errors.append)

    async def main():
        limit = app.connections._BodyLimit(Request())
        for total in (1, 2, 3):
            Request.content.total_bytes = total
            limit._check()
        Transport.reading = False  # the handler does not take what arrives
        limit._check()
        assert not errors
        Transport.reading = True
        limit._check()
        assert len(errors) == 1 and errors[0].status == 408
        limit._timer.cancel()

    asyncio.run(main())


def test_a_page_that_is_open_for_longer_is_not_cut(listening):
    async def body(api, host, port):
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"http://{host}:{port}/ws?clientId=page") as ws,
        ):
            await ws.receive(timeout=5)
            await asyncio.sleep(1.2)
            await api.server.send("later", 1, "page")
            assert (await ws.receive(timeout=5)).json()["type"] == "later"

    listening(body)


def test_a_download_that_takes_longer_is_not_cut(listening, folders):
    """Not even when the next request arrives in the meantime."""
    (folders / "output/large.bin").write_bytes(bytes(32 * 2**20))

    async def body(api, host, port):
        reader, writer = await asyncio.open_connection(host, port, limit=1024)
        request = b"GET %s HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        writer.write(request % b"/view?filename=large.bin")
        await asyncio.sleep(0.2)
        writer.write(request % b"/prompt" + b"GET /pro")
        await asyncio.sleep(1.0)
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(32):
            await reader.readexactly(2**20)
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
        writer.close()

    listening(body)


def full_disk(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_what_was_there(serve, folders, flags):
    async def body(api):
        await api.json("POST", "/userdata/w.json", data=b"old")
        await api.json("POST", "/settings", json={"a": 1})
        await api.json("POST", "/upload/image", data=form(png()))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(atomic_files.os, "fsync", full_disk)
            for path, more in (
                ("/userdata/w.json", {"data": b"new"}), ("/userdata/other.json", {"data": b"new"}),
                ("/settings", {"json": {"a": 2}}), ("/settings/a", {"json": 2}),
                ("/upload/image", {"data": form(png((1, 1, 1, 1)), overwrite="true")}),
                ("/upload/image", {"data": form(png(), name="new.png")}),
            ):  # fmt: skip
                async with api.client.post(path, **more) as answer:
                    assert answer.status == 507 and "disk is full" in await answer.text(), path
        assert (folders / "user/default/w.json").read_bytes() == b"old"
        assert await api.json("GET", "/settings") == {"a": 1}
        assert (folders / "input/picture.png").read_bytes() == png()
        assert sorted(os.listdir(folders / "input")) == ["picture.png"]
        assert sorted(os.listdir(folders / "user/default")) == ["comfy.settings.json", "w.json"]

    serve(body)
    flags(multi_user=True)

    async def users(api):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(atomic_files.os, "fsync", full_disk)
            assert await api.status("POST", "/users", json={"username": "Ann"}) == 507
        assert await api.json("GET", "/users") == {"storage": "server", "users": {}}

    serve(users)


def test_uploads_at_the_same_time_get_names_of_their_own(serve, folders):
    async def body(api):
        contents = [png((number, 0, 0, 255)) for number in range(12)]
        answers = await asyncio.gather(*(api.json("POST", "/upload/image", data=form(content)) for content in contents))
        stored = {(folders / "input" / answer["name"]).read_bytes() for answer in answers}
        assert stored == set(contents) and len({answer["name"] for answer in answers}) == 12
        statuses = await asyncio.gather(
            *(api.status("POST", "/userdata/one.txt?overwrite=false", data=str(number).encode()) for number in range(8))
        )
        assert sorted(statuses) == [200] + [409] * 7

    serve(body)


def test_settings_sent_at_the_same_time_are_all_kept(serve):
    async def body(api):
        await asyncio.gather(*(api.json("POST", f"/settings/s{number}", json=number) for number in range(12)))
        assert await api.json("GET", "/settings") == {f"s{number}": number for number in range(12)}

    serve(body)


def test_a_large_upload_is_not_kept_in_memory(serve, folders):
    """The parts are written as they arrive: half way the temporary file has what was sent."""

    async def body(api):
        sent, seen = 0, []

        async def parts():
            nonlocal sent
            yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.bin"\r\n\r\n'
            for _ in range(8):
                yield bytes(2**20)
                sent += 1
                if sent == 6:
                    for _ in range(500):
                        seen[:] = [path.stat().st_size for path in (folders / "input").iterdir()]
                        if seen and seen[0] >= 2**20:
                            break
                        await asyncio.sleep(0.01)
            yield b"\r\n--x--\r\n"

        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        answer = await api.json("POST", "/upload/image", data=parts(), headers=headers)
        assert seen[0] >= 2**20
        assert answer["name"] == "a.bin" and os.path.getsize(folders / "input/a.bin") == 8 * 2**20

    serve(body)


def test_fields_of_a_form_may_come_in_any_order(serve, folders):
    async def body(api):
        edge = "--x\r\nContent-Disposition: form-data; name="
        image = f'{edge}"image"; filename="a.png"\r\n\r\ncontent\r\n'
        kind, subfolder = f'{edge}"type"\r\n\r\noutput\r\n', f'{edge}"subfolder"\r\n\r\ndeep/er\r\n'
        for parts in ((image, kind, subfolder), (kind, image, subfolder)):
            answer = await api.json(
                "POST", "/upload/image", data=("".join(parts) + "--x--\r\n").encode(),
                headers={"Content-Type": "multipart/form-data; boundary=x"},
            )  # fmt: skip
            assert answer == {"name": "a.png", "subfolder": "deep/er", "type": "output"}
        assert (folders / "output/deep/er/a.png").read_bytes() == b"content"
        assert os.listdir(folders / "input") == []

    serve(body)


def test_settings_are_answered_with_400_not_500(serve, folders):
    async def body(api):
        for data in (b"", b"[1]", b"1", b"{", b"NaN", b'{"a": NaN}', b"\xff", b"[" * 100_000):
            assert await api.status("POST", "/settings", data=data) == 400, data
        assert await api.status("POST", "/settings/a", data=b"Infinity") == 400
        await api.json("POST", "/settings/a", data=b"1e999")
        async with api.client.get("/settings") as answer:
            assert json.loads(await answer.text(), parse_constant=pytest.fail) == {"a": None}
        for damaged in ("[1]", "{", '{"a": NaN}', "\ud800".encode("utf-8", "surrogatepass")):
            path = folders / "user/default/comfy.settings.json"
            path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
            assert await api.json("GET", "/settings") == {} and await api.json("GET", "/settings/a") is None

    serve(body)


def test_a_settings_file_that_is_a_link_outside_is_refused(serve, folders):
    (folders / "user/default").mkdir(parents=True)
    (folders / "elsewhere.json").write_text('{"a": 1}')
    os.symlink(folders / "elsewhere.json", folders / "user/default/comfy.settings.json")

    async def body(api):
        assert await api.status("GET", "/settings") == 403
        assert await api.status("POST", "/settings", json={"a": 2}) == 403
        assert (folders / "elsewhere.json").read_text() == '{"a": 1}'

    serve(body)


def test_what_nodes_show_is_json_for_the_page(serve, monkeypatch):
    import nodes

    class Odd:
        RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "run", True, "test"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"value": ("FLOAT", {"default": 0.0, "max": float("inf"), "min": float("-inf")})}}

        def run(self, value):
            return {"ui": {"loss": [float("nan"), float("inf"), 0.5]}}

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Odd", Odd)

    def strict(text):
        return json.loads(text, parse_constant=pytest.fail)

    async def body(api):
        async with api.client.get("/object_info/Odd") as answer:
            limits = strict(await answer.text())["Odd"]["input"]["required"]["value"][1]
            assert limits["max"] > 1e308 and limits["min"] < -1e308
        async with api.client.ws_connect("/ws?clientId=page") as ws:
            prompt = {"1": {"class_type": "Odd", "inputs": {"value": 1.0}}}
            body = {"prompt": prompt, "client_id": "page"}
            prompt_id = (await api.json("POST", "/prompt", json=body))["prompt_id"]
            while True:
                message = strict((await ws.receive(timeout=10)).data)
                if message["type"] == "executed":
                    assert message["data"]["output"] == {"loss": [None, None, 0.5]}
                if message["type"] == "executing" and message["data"]["node"] is None:
                    break
        async with api.client.get(f"/history/{prompt_id}") as answer:
            assert strict(await answer.text())[prompt_id]["outputs"]["1"]["loss"] == [None, None, 0.5]

    serve(body)


def test_a_packed_body_does_not_unpack_without_end(serve):
    import gzip

    async def body(api):
        packed = io.BytesIO(gzip.compress(bytes(200_000_000), 1))
        headers = {"Content-Encoding": "gzip"}
        async with api.client.post("/userdata/bomb.txt", data=packed, headers=headers) as answer:
            assert answer.status == 413

    serve(body)


def test_every_part_of_a_form_counts(serve, flags):
    flags(max_upload_size=0.01)

    async def body(api):
        edge = b'--x\r\nContent-Disposition: form-data; name="%s"; filename="a.png"\r\n\r\n'
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        limit = api.server.app._client_max_size
        for names, sizes, expected in (
            ((b"image",), (limit,), 200), ((b"image",), (limit + 1,), 413), ((b"other", b"image"), (limit + 1, 1), 413),
            ((b"other", b"image"), (limit, 2), 413), ((b"image", b"image"), (limit // 2, limit), 413),
        ):  # fmt: skip
            parts = [edge % name + b"x" * size + b"\r\n" for name, size in zip(names, sizes, strict=True)]
            data = b"".join(parts) + b"--x--\r\n"
            assert await api.status("POST", "/upload/image", data=data, headers=headers) == expected, (names, sizes)

    serve(body)


def test_links_between_the_servers_own_folders_are_followed(serve, folders):
    Image.new("RGB", (4, 4)).save(folders / "output/a.png")
    os.symlink(folders / "output", folders / "input/results")

    async def body(api):
        assert await api.status("GET", "/view?filename=a.png&subfolder=results&type=input") == 200

    serve(body)


@pytest.mark.parametrize("damaged", ["[1]", '{"ann_1": "Ann"'])
def test_a_damaged_list_of_users_is_not_replaced(serve, folders, flags, damaged):
    (folders / "user").mkdir()
    (folders / "user/users.json").write_text(damaged)
    flags(multi_user=True)

    async def body(api):
        pytest.fail("it started without the users")

    with pytest.raises(ValueError, match=r"users\.json is damaged .* repair it or move it away"):
        serve(body)
    assert (folders / "user/users.json").read_text() == damaged


def test_many_users_are_told_what_that_is(serve, flags, caplog):
    flags(multi_user=True)

    async def body(api):
        pass

    serve(body)
    assert "separates folders, not people" in caplog.text
