"""Descriptions of the program and its nodes, who may call, extra folders and logs."""

from __future__ import annotations

import os

import pytest

import nodes


def test_nodes_are_described(serve):
    async def body(api):
        one = await api.json("GET", "/object_info/Echo")
        assert one["Echo"]["input"]["required"]["value"] == ["INT", {"default": 0, "min": 0, "max": 100}]
        assert one["Echo"]["input_order"] == {"required": ["value", "kind"]}
        assert one["Echo"]["display_name"] == "Echo (test)"
        assert one["Echo"]["output_node"] is True
        assert await api.json("GET", "/object_info/Nothing") == {}
        every = await api.json("GET", "/api/object_info")
        assert {"Echo", "KSampler", "SaveImage"} <= set(every)

    serve(body)


def test_a_node_that_cannot_describe_itself_is_left_out(serve, monkeypatch):
    class Broken:
        @classmethod
        def INPUT_TYPES(cls):
            raise RuntimeError("no")

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Broken", Broken)

    async def body(api):
        assert "Broken" not in await api.json("GET", "/object_info")

    serve(body)


def test_the_machine_is_described(serve):
    async def body(api):
        stats = await api.json("GET", "/system_stats")
        assert {
            "os",
            "ram_total",
            "ram_free",
            "comfyui_version",
            "taco_dit_version",
            "python_version",
            "pytorch_version",
            "argv",
            "embedded_python",
            "required_frontend_version",
        } <= set(stats["system"])
        assert {"name", "type", "index", "vram_total", "vram_free", "torch_vram_total", "torch_vram_free"} == set(
            stats["devices"][0]
        )
        assert (await api.json("GET", "/features"))["supports_preview_metadata"] is True
        assert (await api.json("GET", "/taco_dit/status"))["world_size"] == 1
        api.server.taco_status = lambda: {"world_size": 3}
        assert await api.json("GET", "/api/taco_dit/status") == {"world_size": 3}

    serve(body)


def test_without_the_page_it_is_said_how_to_install_it(serve, monkeypatch):
    async def body(api):
        api.server.web_root = None
        async with api.client.get("/") as response:
            assert response.status == 200
            assert "pip install comfyui-frontend-package" in await response.text()

    serve(body)


def test_a_page_can_be_given(serve, tmp_path, flags):
    root = tmp_path / "page"
    (root / "extensions/core").mkdir(parents=True)
    (root / "index.html").write_text("<p>hello</p>")
    (root / "extensions/core/x.js").write_text("")
    flags(front_end_root=str(root))

    async def body(api):
        async with api.client.get("/") as response:
            assert await response.text() == "<p>hello</p>"
            assert response.headers["Cache-Control"] == "no-cache"
        async with api.client.get("/extensions/core/x.js") as response:
            assert response.status == 200
            assert response.headers["Cache-Control"] == "no-cache"
        assert await api.json("GET", "/extensions") == ["/extensions/core/x.js"]

    serve(body)


def test_pages_of_other_sites_are_refused(serve):
    async def body(api):
        port = api.client.port
        here = {"Host": f"127.0.0.1:{port}"}
        for origin, status in (
            (f"http://127.0.0.1:{port}", 200),
            ("http://127.0.0.1:1", 403),
            ("https://evil.example", 403),
            ("http://localhost.evil.example", 403),
        ):
            assert await api.status("GET", "/prompt", headers={**here, "Origin": origin}) == status, origin
        assert await api.status("GET", "/prompt", headers=here) == 200
        ws = {
            "Host": f"localhost:{port}",
            "Origin": "https://evil.example",
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        }
        assert await api.status("GET", "/ws", headers=ws) == 403

    serve(body)


def test_cross_origin_calls_can_be_allowed(serve, flags):
    flags(enable_cors_header="https://friend.example")

    async def body(api):
        async with api.client.options("/prompt") as response:
            assert response.status == 200
        async with api.client.get("/prompt", headers={"Origin": "https://friend.example"}) as response:
            assert response.headers["Access-Control-Allow-Origin"] == "https://friend.example"

    serve(body)


def test_answers_can_be_compressed(serve, flags):
    flags(enable_compress_response_body=True)

    async def body(api):
        async with api.client.get("/object_info", headers={"Accept-Encoding": "gzip"}) as response:
            assert response.headers["Content-Encoding"] == "gzip"

    serve(body)


def test_node_packs_bring_routes_scripts_texts_and_examples(serve, folders, monkeypatch):
    pack = folders / "custom_nodes/pack"
    (pack / "locales/de").mkdir(parents=True)
    (pack / "locales/de/main.json").write_text('{"a": {"b": "c"}}')
    (pack / "locales/de/nodeDefs.json").write_text('{"N": 1}')
    (pack / "example_workflows").mkdir()
    (pack / "example_workflows/one.json").write_text("{}")
    (pack / "subgraphs").mkdir()
    (pack / "subgraphs/s.json").write_text('{"nodes": []}')
    (pack / "js").mkdir()
    (pack / "js/x.js").write_text("")
    (pack / "__init__.py").write_text(
        "from aiohttp import web\n"
        "from server import PromptServer\n"
        "@PromptServer.instance.routes.get('/pack/{name}')\n"
        "async def hello(request):\n"
        "    return web.json_response(request.match_info['name'])\n"
        "NODE_CLASS_MAPPINGS = {}\n"
        "WEB_DIRECTORY = './js'\n"
    )
    (folders / "custom_nodes/broken").mkdir()
    (folders / "custom_nodes/broken/__init__.py").write_text("raise RuntimeError('no')")
    (folders / "custom_nodes/off.disabled").mkdir()
    monkeypatch.setattr(nodes, "EXTENSION_WEB_DIRS", nodes.EXTENSION_WEB_DIRS)
    for mapping in (nodes.EXTENSION_WEB_DIRS, nodes.LOADED_MODULE_DIRS):
        monkeypatch.delitem(mapping, "pack", raising=False)

    def before(server):
        import asyncio
        import threading

        # the loop of the test is running in this thread
        loader = threading.Thread(target=lambda: asyncio.run(nodes.init_external_custom_nodes()))
        loader.start()
        loader.join()

    async def body(api):
        assert await api.json("GET", "/pack/x") == "x"
        assert await api.json("GET", "/api/pack/y") == "y"
        assert await api.status("GET", "/extensions/pack/x.js") == 200
        assert "/extensions/pack/x.js" in await api.json("GET", "/extensions")
        assert await api.json("GET", "/i18n") == {"de": {"a": {"b": "c"}, "nodeDefs": {"N": 1}}}
        assert (await api.json("GET", "/workflow_templates"))["pack"] == ["one"]
        assert await api.status("GET", "/api/workflow_templates/pack/one.json") == 200
        graphs = await api.json("GET", "/global_subgraphs")
        key = next(key for key, graph in graphs.items() if graph["name"] == "s")
        assert (await api.json("GET", f"/global_subgraphs/{key}"))["data"] == '{"nodes": []}'
        assert "broken" not in nodes.LOADED_MODULE_DIRS

    try:
        serve(body, before=before)
    finally:
        nodes.EXTENSION_WEB_DIRS.pop("pack", None)
        nodes.LOADED_MODULE_DIRS.pop("pack", None)


def test_internal_routes(serve, folders):
    for number, name in enumerate(["old.png", "new.png"]):
        (folders / "output" / name).write_text("")
        os.utime(folders / "output" / name, (number, number))

    async def body(api):
        assert await api.json("GET", "/internal/files/output") == ["new.png", "old.png"]
        assert await api.status("GET", "/internal/files/models") == 400
        assert await api.status("GET", "/api/internal/files/output") == 404
        assert "loras" in await api.json("GET", "/internal/folder_paths")
        assert set(await api.json("GET", "/internal/logs/raw")) == {"entries", "size"}
        assert isinstance(await api.json("GET", "/internal/logs"), str)
        await api.json("PATCH", "/internal/logs/subscribe", json={"clientId": "page", "enabled": True})

    serve(body)


def test_our_nodes_have_help_in_english_and_chinese(serve):
    import comfy_extras.nodes_taco_dit as ours

    async def body(api):
        for name in ours.NODE_CLASS_MAPPINGS:
            for page in ("en", "zh"):
                async with api.client.get(f"/docs/{name}/{page}.md") as answer:
                    assert answer.status == 200 and ours.NODE_DISPLAY_NAME_MAPPINGS[name] in await answer.text()
        for path in ("/docs/Nothing/en.md", "/docs/..%2f..%2fpanel.py"):
            assert await api.status("GET", path) == 404

    serve(body)


def test_the_version_is_that_of_the_project():
    import tomllib

    import comfy.taco_dit

    root = os.path.dirname(os.path.abspath(nodes.__file__))
    with open(os.path.join(root, "pyproject.toml"), "rb") as file:
        assert tomllib.load(file)["project"]["version"] == comfy.taco_dit.__version__


def test_system_users_are_no_persons(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    assert folder_paths.get_system_user_directory("manager") == str(tmp_path / "__manager")
    for name in ("", "_manager", "a/b", "..", "a-b"):
        with pytest.raises(ValueError, match="no name of a system user"):
            folder_paths.get_system_user_directory(name)
    assert folder_paths.get_public_user_directory("ann") == str(tmp_path / "ann")
    assert folder_paths.get_public_user_directory("__manager") is None
    assert folder_paths.get_public_user_directory("") is None


def test_a_person_cannot_take_a_system_users_name(serve):
    async def body(api):
        api.server.user_manager.multi_user = True
        assert await api.status("POST", "/users", json={"username": "__manager"}) == 400
        api.server.user_manager.users["__manager"] = "x"
        assert await api.status("GET", "/userdata?dir=.", headers={"comfy-user": "__manager"}) == 401

    serve(body)
