"""What the server must never do: leave its folders, serve other sites, run what users stored, or tell secrets."""

from __future__ import annotations

import ast
import asyncio
import glob
import json
import logging
import os
import time

import pytest
from test_files import form, png

import nodes
from comfy.cli_args import build_parser

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SECRET = b"nobody may see this"


async def raw(api, method, target, body=b"", **headers):
    """(status, answer) of a request whose target is sent exactly as it is; 0 when the connection is closed on it."""
    reader, writer = await asyncio.open_connection(api.client.host, api.client.port)
    lines = [f"{method} {target} HTTP/1.1", f"Host: {api.client.host}:{api.client.port}", "Connection: close",
             f"Content-Length: {len(body)}", *(f"{name}: {value}" for name, value in headers.items())]  # fmt: skip
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
    answer = await reader.read()
    writer.close()
    head, _, content = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, content


@pytest.fixture
def trap(folders):
    """A secret beside, above and behind every served folder."""
    base = folders / "base"
    for name in ("input", "output", "temp", "models/loras", "user/default", "custom_nodes/web/js"):
        (base / name).mkdir(parents=True)
    (folders / "outside").mkdir()
    for at in (folders, folders / "outside", base, base / "user", base / "models", base / "custom_nodes/web"):
        (at / "secret.txt").write_bytes(SECRET)
        (at / "secret.safetensors").write_bytes(SECRET)
        (at / "secret.png").write_bytes(SECRET)
    for at in ("input", "output", "user/default", "models/loras", "custom_nodes/web/js"):
        os.symlink(folders / "outside", base / at / "link")
        os.symlink(folders / "secret.txt", base / at / "link.txt")
    import folder_paths

    folder_paths.set_base_directory(str(base))
    return folders


def escapes(trap):
    """Ways out, as a browser could never, but an attacker would send them."""
    up = ["..", "%2e%2e", "%2E%2E", "..%00", "%252e%252e", "%c0%ae%c0%ae", "....", "..;"]
    ways = [f"{dots}{slash}secret.txt" for dots in up for slash in ("/", "%2f", "%5c", "\\", "%252f", "%255c")]
    absolute = str(trap / "secret.txt")
    ways += [
        absolute,
        absolute.replace("/", "%2F"),
        absolute.replace("/", "%252F"),
        f"file://{absolute}",
        f"/{absolute}",
    ]
    ways += ["C:%5Csecret.txt", "C:/secret.txt", "c:secret.txt", "%5C%5Chost%5Cshare%5Csecret.txt", "//host/secret.txt",
             "link/secret.txt", "link%2Fsecret.txt", "link.txt", "a/../../secret.txt", "./../secret.txt",
             "secret.txt%00.png", "..%2fsecret.txt%00", "~/secret.txt", "%7E/secret.txt", ""]  # fmt: skip
    return ways


READERS = (
    "/view?filename={}&type=input", "/view?filename={}&type=output&preview=webp", "/view?filename={}%20[input]",
    "/view?filename=secret.txt&type=input&subfolder={}", "/view?filename=secret.txt&type={}", "/api/view?filename={}",
    "/userdata/{}", "/api/userdata/{}", "/userdata?dir={}", "/v2/userdata?path={}", "/settings/{}",
    "/view_metadata/loras?filename={}", "/view_metadata/{}?filename=secret.safetensors", "/models/{}",
    "/experiment/models/{}", "/experiment/models/preview/loras/0/{}", "/experiment/models/preview/{}/0/secret.png",
    "/experiment/models/preview/loras/{}/secret.png", "/templates/{}", "/extensions/web/{}", "/extensions/{}", "/docs/{}",
    "/api/workflow_templates/web/{}", "/internal/files/{}", "/history/{}", "/jobs/{}", "/object_info/{}",
    "/global_subgraphs/{}", "/{}",
)  # fmt: skip


def with_pack(trap, monkeypatch):
    """A pack whose web folder and examples are served."""

    def before(server):
        monkeypatch.setitem(nodes.EXTENSION_WEB_DIRS, "web", str(trap / "base/custom_nodes/web/js"))
        monkeypatch.setitem(nodes.LOADED_MODULE_DIRS, "web", str(trap / "base/custom_nodes/web"))

    return before


@pytest.mark.parametrize("reader", READERS)
def test_nothing_outside_is_read(serve, trap, monkeypatch, reader):
    (trap / "base/custom_nodes/web/examples").mkdir()

    async def body(api):
        for way in escapes(trap):
            status, content = await raw(api, "GET", reader.format(way))
            assert SECRET not in content, way
            assert status < 500, (way, content)

    serve(body, before=with_pack(trap, monkeypatch))


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_nothing_outside_is_written_moved_or_deleted(serve, trap):
    async def body(api):
        await raw(api, "POST", "/userdata/mine.txt", b"mine")
        outside = contents(trap)
        for way in escapes(trap):
            for method, target in (
                ("POST", "/userdata/{}"), ("DELETE", "/userdata/{}"), ("POST", "/api/userdata/{}?overwrite=true"),
                ("POST", "/userdata/{}/move/stolen.txt"), ("POST", "/userdata/mine.txt/move/{}"),
            ):  # fmt: skip
                status, content = await raw(api, method, target.format(way), b"changed")
                assert status < 500, (method, target, way, content)
            for name in ("mine.txt", "stolen.txt"):
                path = trap / "base/user/default" / name
                assert not path.exists() or path.read_bytes() in (b"mine", b"changed"), (way, path.read_bytes())
            await raw(api, "POST", "/userdata/mine.txt", b"mine")
        after = contents(trap)
        inside = str(trap / "base/user/default")
        for path, content in outside.items():
            if path.name != "mine.txt":
                assert after.get(path) == content, f"{path} was changed"
        new = [path for path in after if path not in outside and not str(path).startswith(inside)]
        assert not new, "written outside the user's folder"

    serve(body)


def test_uploads_stay_inside(serve, trap):
    async def body(api):
        outside = {path: content for path, content in contents(trap).items() if "base/input" not in str(path)}
        for way in [*escapes(trap), "..", ".", "a\0b", "CON", "x" * 300]:
            for route in ("/upload/image", "/upload/mask"):
                reference = json.dumps({"filename": way, "type": "input", "subfolder": way})
                # the client itself refuses to send a NUL as a file's name
                name = way.replace("\0", "") or "x"
                for fields in ({"subfolder": way}, {"type": way}, {"name": name}, {"original_ref": reference}):
                    async with api.client.post(route, data=form(png(), overwrite="true", **fields)) as answer:
                        assert answer.status < 500, (route, fields, await answer.text())
        after = {path: content for path, content in contents(trap).items() if "base/input" not in str(path)}
        assert after == outside

    serve(body)


def test_a_page_of_another_site_is_refused(serve):
    async def body(api):
        port = api.client.port
        cross = {"Sec-Fetch-Site": "cross-site"}
        cases = [
            ("POST", {"Origin": "https://evil.example"}, 403), ("GET", {"Origin": f"http://evil.example:{port}"}, 403),
            ("GET", {"Origin": f"http://127.0.0.1:{port + 1}"}, 403),
            ("GET", {"Origin": "http://127.0.0.1.evil.example"}, 403),
            ("GET", cross, 403), ("POST", cross | {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, 403),
            ("GET", cross | {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "script"}, 403),
            ("GET", cross | {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}, 403),
            ("GET", cross | {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, 200),  # a link to the page
            ("GET", {"Sec-Fetch-Site": "same-origin"}, 200), ("GET", {"Sec-Fetch-Site": "none"}, 200),
            ("GET", {"Origin": f"http://{api.client.host}:{port}"}, 200), ("GET", {}, 200),
        ]  # fmt: skip
        for method, headers, expected in cases:
            status, _ = await raw(api, method, "/prompt", b"{}", **headers)
            assert status == expected, (method, headers)
        status, _ = await raw(api, "GET", "/ws", Upgrade="websocket", Connection="Upgrade", **cross,
                              **{"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="})  # fmt: skip
        assert status == 403
        assert not api.server.prompt_queue.queue and not api.server.sockets

    serve(body)


@pytest.mark.parametrize(
    "name",
    ["x.svg", "x.SVG", "x.html", "x.HTM", "x.js", "x.mjs", "x.xhtml", "x.xml", "x.svgz", "x.mht", "x.mhtml", "x.pdf"],
)
def test_what_users_stored_is_never_run(serve, folders, name):
    (folders / "output" / name).write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")

    async def body(api):
        upload = form(b"<script>alert(1)</script>", name=name)
        assert await api.status("POST", "/upload/image", data=upload) in (200, 400)
        assert await api.status("POST", f"/userdata/{name}", data=b"<script>alert(1)</script>") == 200
        for path in (f"/view?filename={name}&type=output", f"/view?filename={name}&type=input", f"/userdata/{name}"):
            async with api.client.get(path) as response:
                kind = response.content_type
                assert kind == "application/octet-stream", (path, kind)
                assert "/view" not in path or response.headers["Content-Disposition"].startswith("attachment"), path
                assert response.headers["X-Content-Type-Options"] == "nosniff", path

    serve(body)


def test_too_much_is_refused_by_every_route(serve, flags):
    flags(max_upload_size=0.02)

    async def body(api):
        big = b"x" * 40000
        answers = [
            await api.status("POST", "/upload/image", data=form(big)),
            await api.status("POST", "/upload/mask", data=form(big)),
            await api.status("POST", "/userdata/big.txt", data=big),
            await api.status("POST", "/prompt", json={"prompt": {"1": {"class_type": big.decode(), "inputs": {}}}}),
            await api.status("POST", "/settings", json={"a": big.decode()}),
        ]  # fmt: skip
        assert answers == [413] * 5
        assert await api.status("POST", "/userdata/small.txt", data=b"x" * 100) == 200

    serve(body)


class SecretFails:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT", {})},
                "hidden": {"key": "API_KEY_COMFY_ORG", "token": "AUTH_TOKEN_COMFY_ORG"}}  # fmt: skip

    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True
    CATEGORY = "test"

    def run(self, value, key, token):
        assert key == "hush-key" and token == "hush-token"
        raise ValueError("no")


def test_keys_and_tokens_are_never_shown(serve, monkeypatch, caplog):
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "SecretFails", SecretFails)
    caplog.set_level(logging.DEBUG)
    extra = {"api_key_comfy_org": "hush-key", "auth_token_comfy_org": "hush-token", "kept": "kept"}

    async def shown(api, prompt_id):
        heard = ""
        for path in ("/history", f"/history/{prompt_id}", "/queue", "/jobs", f"/jobs/{prompt_id}", "/object_info",
                     "/object_info/SecretFails", "/internal/logs", "/internal/logs/raw", "/system_stats"):  # fmt: skip
            async with api.client.get(path) as response:
                heard += await response.text()
        return heard

    async def waiting(api):
        prompt = {"1": {"class_type": "SecretFails", "inputs": {"value": 1}}}
        answer = await api.json("POST", "/prompt", json={"prompt": prompt, "extra_data": extra})
        heard = await shown(api, answer["prompt_id"])
        assert "kept" in heard and "hush" not in heard
        await api.json("POST", "/prompt", 400, json={"prompt": {"1": {"class_type": "No"}}, "extra_data": extra})

    async def failing(api):
        ws = await api.client.ws_connect("/ws?clientId=page")
        prompt = {"1": {"class_type": "SecretFails", "inputs": {"value": 1}}}
        body = {"prompt": prompt, "extra_data": extra, "client_id": "page"}
        prompt_id = (await api.json("POST", "/prompt", json=body))["prompt_id"]
        heard = ""
        while '"executing", "data": {"node": null' not in heard:
            heard += (await ws.receive(timeout=10)).data
        assert "execution_error" in heard and '"value": [1]' in heard
        heard += await shown(api, prompt_id)
        assert "kept" in heard and "hush" not in heard

    serve(waiting, working=False)
    serve(failing)
    assert "hush" not in caplog.text


def _loads(path):
    """Calls of torch.load in a file: (line, whether it may run code from the file)."""
    with open(path, encoding="utf-8") as stream:
        tree = ast.parse(stream.read())
    for call in [found for found in ast.walk(tree) if isinstance(found, ast.Call)]:
        function = call.func
        owner = getattr(function, "value", None)
        if isinstance(function, ast.Attribute) and isinstance(owner, ast.Name):
            if (owner.id, function.attr) == ("torch", "load"):
                safe = [word.value for word in call.keywords if word.arg == "weights_only"]
                yield call.lineno, not (safe and isinstance(safe[0], ast.Constant) and safe[0].value is True)
            elif owner.id in ("pickle", "dill", "cloudpickle", "joblib") and function.attr == "load":
                yield call.lineno, True


def test_no_file_is_unpickled():
    """The one load that may run code is of what our own rank 0 sent to the others; it never sees a file."""
    ours = [path for pattern in ("*.py", "app/**/*.py", "comfy*/**/*.py", "utils/**/*.py")
            for path in glob.glob(os.path.join(ROOT, pattern), recursive=True)]  # fmt: skip
    found = [(os.path.relpath(path, ROOT), unsafe) for path in ours for _, unsafe in _loads(path)]
    assert len(ours) > 100 and ("comfy/checkpoint_files.py", False) in found
    assert [path for path, unsafe in found if unsafe] == ["comfy/taco_dit/core/lockstep.py"]


def test_it_listens_to_this_machine_only_unless_told():
    assert build_parser().parse_args([]).listen == "127.0.0.1"
    assert build_parser().parse_args(["--listen"]).listen == "0.0.0.0,::"


def test_a_slow_client_does_not_stop_the_others(serve):
    async def body(api):
        reader, writer = await asyncio.open_connection(api.client.host, api.client.port)
        writer.write(b"POST /prompt HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        before = time.monotonic()
        assert await api.status("GET", "/prompt") == 200
        assert time.monotonic() - before < 5
        writer.close()

    serve(body)


def test_a_form_that_is_none(serve):
    async def body(api):
        for data in (b"", b"--x--", b"\xff" * 100):
            for kind in ("multipart/form-data; boundary=x", "multipart/form-data", "text/plain", "application/json"):
                status, _ = await raw(api, "POST", "/upload/image", data, **{"Content-Type": kind})
                assert status == 400, (data, kind)

    serve(body)
