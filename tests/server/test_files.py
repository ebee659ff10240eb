"""Showing and receiving files, users' files, model lists: what works, and what must not."""

from __future__ import annotations

import io
import json
import os
import struct
from urllib.parse import quote

import aiohttp
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import folder_paths


def png(colour=(255, 0, 0, 128), size=(8, 6), texts=None):
    info = PngInfo()
    for key, text in (texts or {}).items():
        info.add_text(key, text)
    buffer = io.BytesIO()
    Image.new("RGBA", size, colour).save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def form(data, name="picture.png", **fields):
    body = aiohttp.FormData()
    body.add_field("image", data, filename=name, content_type="image/png")
    for key, value in fields.items():
        body.add_field(key, value)
    return body


def test_uploads_are_stored_once_and_shown(serve, folders):
    async def body(api):
        first = await api.json("POST", "/upload/image", data=form(png()))
        assert first == {"name": "picture.png", "subfolder": "", "type": "input"}
        assert await api.json("POST", "/upload/image", data=form(png())) == first
        other = await api.json("POST", "/upload/image", data=form(png((0, 0, 0, 0))))
        assert other["name"] == "picture (1).png"
        over = await api.json("POST", "/upload/image", data=form(png((0, 0, 9, 9)), overwrite="true"))
        assert over["name"] == "picture.png"
        deep = await api.json("POST", "/upload/image", data=form(png(), subfolder="a/b", type="temp"))
        assert deep == {"name": "picture.png", "subfolder": "a/b", "type": "temp"}
        assert (folders / "temp/a/b/picture.png").is_file()
        async with api.client.get("/view?filename=picture.png&type=input") as response:
            assert response.status == 200
            assert response.content_type == "image/png"
            assert await response.read() == png((0, 0, 9, 9))
        for query, kind, mode in (
            ("filename=picture.png%20[input]&preview=webp;50", "image/webp", None),
            ("filename=picture.png&type=input&preview=jpeg", "image/jpeg", "RGB"),
            ("filename=picture.png&type=input&channel=rgb", "image/png", "RGB"),
            ("filename=picture.png&type=input&channel=a", "image/png", "RGBA"),
        ):
            async with api.client.get("/api/view?" + query) as response:
                assert response.status == 200
                assert response.content_type == kind
                image = Image.open(io.BytesIO(await response.read()))
                assert image.size == (8, 6)
                assert mode is None or image.mode == mode

    serve(body)


def test_a_mask_is_put_on_the_original(serve, folders):
    (folders / "input/base.png").write_bytes(png((1, 2, 3, 255), texts={"prompt": "{}"}))

    async def body(api):
        reference = json.dumps({"filename": "base.png", "type": "input"})
        data = form(png((9, 9, 9, 77)), name="mask.png", original_ref=reference)
        answer = await api.json("POST", "/upload/mask", data=data)
        with Image.open(folders / "input" / answer["name"]) as image:
            assert image.getpixel((0, 0)) == (1, 2, 3, 77)
            assert image.text == {"prompt": "{}"}
        bad = form(png(), original_ref=json.dumps({"filename": "../../etc/passwd", "type": "input"}))
        assert await api.status("POST", "/upload/mask", data=bad) == 400

    serve(body)


ESCAPES = [
    "../secret.txt",
    "..%2Fsecret.txt",
    "/etc/passwd",
    "%2Fetc%2Fpasswd",
    "..\\secret.txt",
    "\\\\host\\share",
    "C:\\secret.txt",
    "a/../../secret.txt",
    "link/secret.txt",
]


@pytest.fixture
def secrets(folders):
    (folders / "secret.txt").write_text("secret")
    (folders / "outside").mkdir()
    (folders / "outside/secret.txt").write_text("secret")
    (folders / "user/default").mkdir(parents=True)
    for at in ("input", "output", "user/default", "models/loras"):
        os.symlink(folders / "outside", folders / at / "link")
        os.symlink(folders / "secret.txt", folders / at / "link.txt")
    return folders


@pytest.mark.parametrize("name", [*ESCAPES, "link.txt"])
def test_nothing_outside_can_be_read(serve, secrets, name):
    async def body(api):
        raw = quote(name, safe="%")
        for path in (
            f"/view?filename={raw}&type=input",
            f"/view?filename=secret.txt&type=input&subfolder={raw}",
            f"/view?filename=secret.txt&type=input&subfolder={quote(os.path.dirname(name) or '..', safe='')}",
            f"/api/userdata/{quote(name, safe='')}",
            f"/api/userdata?dir={quote(name, safe='')}",
            f"/api/v2/userdata?path={quote(name, safe='')}",
            f"/view_metadata/loras?filename={raw}",
            f"/experiment/models/preview/loras/0/{raw}",
        ):
            async with api.client.get(path) as response:
                text = await response.text()
                assert response.status in (400, 403, 404), path
                assert text != "secret", path

    serve(body)


@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_outside_can_be_written(serve, secrets, name):
    async def body(api):
        before = {path: path.read_text() for path in secrets.rglob("secret.txt")}
        status = await api.status("POST", f"/api/userdata/{quote(name, safe='')}", data=b"overwritten")
        assert status in (400, 403, 404)
        status = await api.status("POST", "/upload/image", data=form(png(), subfolder=name, overwrite="true"))
        # a form is not percent-decoded, so such a name is an ordinary, if odd, folder
        assert status == (200 if "%" in name else 400)
        await api.status("POST", "/upload/image", data=form(png(), name=name, overwrite="true"))
        await api.status("DELETE", f"/api/userdata/{quote(name, safe='')}")
        await api.status("POST", "/api/userdata/new.json", data=b"{}")
        moved = await api.status("POST", f"/api/userdata/new.json/move/{quote(name, safe='')}")
        assert moved in (400, 403, 404)
        assert {path: path.read_text() for path in secrets.rglob("secret.txt")} == before

    serve(body)


@pytest.mark.parametrize("name", ["x.html", "x.htm", "x.xhtml", "x.js", "x.mjs", "x.css", "x.svg", "x.xml"])
def test_active_content_is_never_shown_inline(serve, folders, name):
    (folders / "output" / name).write_text("<script>alert(1)</script>")
    (folders / "user/default").mkdir(parents=True)
    (folders / "user/default" / name).write_text("<script>alert(1)</script>")

    async def body(api):
        async with api.client.get(f"/view?filename={name}&type=output") as response:
            assert response.content_type == "application/octet-stream"
            assert response.headers["Content-Disposition"].startswith("attachment")
            assert response.headers["X-Content-Type-Options"] == "nosniff"
        async with api.client.get(f"/userdata/{name}") as response:
            assert response.content_type in ("application/octet-stream", "text/css")
            assert response.headers["X-Content-Type-Options"] == "nosniff"

    serve(body)


def test_a_file_name_cannot_break_the_header(serve, folders):
    (folders / "output" / 'a"b;é.png').write_bytes(png())

    async def body(api):
        async with api.client.get(
            "/view?" + aiohttp.helpers.URL.build(query={"filename": 'a"b;é.png'}).raw_query_string
        ) as response:
            assert response.status == 200
            assert "filename*=UTF-8''a%22b%3B%C3%A9.png" in response.headers["Content-Disposition"]

    serve(body)


def test_users_files_can_be_kept(serve, folders):
    async def body(api):
        path = "/api/userdata/workflows%2Fa.json"
        info = await api.json("POST", path + "?overwrite=false&full_info=true", data=b"{}")
        assert info["path"] == "workflows/a.json"
        assert info["size"] == 2
        assert await api.status("POST", path + "?overwrite=false", data=b"{}") == 409
        assert await api.json("GET", "/api/userdata?dir=workflows") == ["a.json"]
        split = await api.json("GET", "/api/userdata?dir=workflows&split=true&recurse=true")
        assert split == [["a.json", "a.json"]]
        full = await api.json("GET", "/api/userdata?dir=workflows&recurse=true&full_info=true")
        assert full[0]["path"] == "a.json"
        assert await api.status("GET", "/api/userdata") == 400
        assert await api.status("GET", "/api/userdata?dir=none") == 404
        listed = await api.json("GET", "/api/v2/userdata")
        assert [(e["name"], e["path"], e["type"]) for e in listed] == [
            ("workflows", "workflows", "directory"),
            ("a.json", "workflows/a.json", "file"),
        ]
        assert listed[1]["size"] == 2
        moved = await api.json("POST", path + "/move/workflows%2Fb.json")
        assert moved == "workflows/b.json"
        async with api.client.get("/api/userdata/workflows%2Fb.json") as response:
            assert await response.text() == "{}"
        assert await api.status("DELETE", "/api/userdata/workflows%2Fb.json") == 204
        assert await api.status("GET", "/api/userdata/workflows%2Fb.json") == 404

    serve(body)


def test_settings_and_users(serve, folders, flags):
    async def single(api):
        assert await api.json("GET", "/api/settings") == {}
        await api.json("POST", "/api/settings", json={"a": 1, "b": 2})
        await api.json("POST", "/api/settings/b", json={"c": [3]})
        assert await api.json("GET", "/settings") == {"a": 1, "b": {"c": [3]}}
        assert await api.json("GET", "/settings/a") == 1
        assert (await api.json("GET", "/users"))["storage"] == "server"

    serve(single)
    flags(multi_user=True)

    async def several(api):
        assert await api.json("GET", "/users") == {"storage": "server", "users": {}}
        user = await api.json("POST", "/users", json={"username": "Ann/../x"})
        assert "/" not in user
        assert await api.status("POST", "/users", json={"username": "Ann/../x"}) == 400
        assert await api.status("POST", "/users", json={"username": " "}) == 400
        assert await api.status("GET", "/settings") == 401
        assert await api.json("GET", "/settings", headers={"comfy-user": user}) == {}
        assert await api.status("GET", "/settings", headers={"comfy-user": "../default"}) == 401

    serve(several)


def safetensors(path, metadata):
    header = json.dumps({"__metadata__": metadata}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def test_models_are_listed(serve, folders):
    safetensors(folders / "models/loras/a.safetensors", {"title": "A"})
    (folders / "models/loras/a.png").write_bytes(png())
    (folders / "models/loras/notes.txt").write_text("")
    (folders / "models/embeddings/e.pt").write_bytes(b"")

    async def body(api):
        kinds = await api.json("GET", "/models")
        assert kinds[:3] == ["checkpoints", "configs", "loras"]
        assert await api.json("GET", "/models/loras") == ["a.safetensors"]
        assert await api.status("GET", "/models/nonsense") == 404
        assert await api.json("GET", "/embeddings") == ["e"]
        assert await api.json("GET", "/view_metadata/loras?filename=a.safetensors") == {"title": "A"}
        assert await api.status("GET", "/view_metadata/loras?filename=b.safetensors") == 404
        names = [entry["name"] for entry in await api.json("GET", "/experiment/models")]
        assert "loras" in names
        assert "configs" not in names
        listed = await api.json("GET", "/experiment/models/loras")
        assert listed[0]["name"] == "a.safetensors"
        assert listed[0]["pathIndex"] == 0
        async with api.client.get("/experiment/models/preview/loras/0/a.safetensors") as response:
            assert response.content_type == "image/webp"
        assert await api.status("GET", "/experiment/models/preview/loras/7/a.safetensors") == 404
        (folders / "models/loras/b.safetensors").write_bytes(b"")
        folder_paths.filename_list_cache.clear()
        assert await api.json("GET", "/models/loras") == ["a.safetensors", "b.safetensors"]

    serve(body)


def test_too_large_uploads_are_refused(serve, flags):
    flags(max_upload_size=0.01)

    async def body(api):
        assert await api.status("POST", "/upload/image", data=form(b"x" * 20000)) == 413
        assert (await api.json("GET", "/features"))["max_upload_size"] == 10486

    serve(body)
