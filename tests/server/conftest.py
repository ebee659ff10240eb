"""The real server over aiohttp's test client, in directories of its own, with one small node and a worker thread."""

from __future__ import annotations

import asyncio
import threading

import pytest
from aiohttp.test_utils import TestClient, TestServer

import comfy.cli_args
import comfy.utils
import execution
import folder_paths
import nodes
from comfy_execution.worker import PromptWorker
from server import PromptServer


class Echo:
    """Shows its input; an output node."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT", {"default": 0, "min": 0, "max": 100}), "kind": (["a", "b"],)}}

    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True
    CATEGORY = "test"

    def run(self, value, kind):
        return {"ui": {"value": [value], "kind": [kind]}}


class Api:
    """A running server: `client` for requests, `server`, `worker`, `loop`."""

    def __init__(self, client, server, worker):
        self.client = client
        self.server = server
        self.worker = worker

    async def json(self, method, path, status=200, **arguments):
        async with self.client.request(method, path, **arguments) as response:
            assert response.status == status, await response.text()
            text = await response.text()
            return await response.json() if text else None

    async def status(self, method, path, **arguments):
        async with self.client.request(method, path, **arguments) as response:
            await response.read()
            return response.status


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    """A test's server reports progress to its own event loop, which is closed after the test."""
    yield
    comfy.utils.set_progress_bar_global_hook(None)


@pytest.fixture
def folders(tmp_path):
    folder_paths.set_base_directory(str(tmp_path))
    for name in ("input", "output", "temp", "models/loras", "models/embeddings", "custom_nodes"):
        (tmp_path / name).mkdir(parents=True)
    yield tmp_path
    folder_paths.set_base_directory(None)


@pytest.fixture
def flags(monkeypatch):
    """Set flags of the command line for one test: `flags(port=1)`."""

    def change(**values):
        for name, value in values.items():
            monkeypatch.setattr(comfy.cli_args.args, name, value)

    return change


@pytest.fixture
def serve(folders, monkeypatch):
    """`serve(coroutine function)` runs it with an `Api` against a fresh server."""
    monkeypatch.delenv("TACO_TOKEN", raising=False)
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Echo", Echo)
    monkeypatch.setitem(nodes.NODE_DISPLAY_NAME_MAPPINGS, "Echo", "Echo (test)")

    def run(body, before=None, working=True, seconds=30):
        async def main():
            server = PromptServer(asyncio.get_running_loop())
            server.prompt_queue = execution.PromptQueue(server)
            if before is not None:
                before(server)
            server.add_routes()
            worker = PromptWorker(server.prompt_queue, server)
            thread = threading.Thread(target=worker.run, daemon=True)
            if working:
                thread.start()
            publishing = asyncio.create_task(server.publish_loop())
            async with TestClient(TestServer(server.app)) as client:
                try:
                    await asyncio.wait_for(body(Api(client, server, worker)), seconds)
                finally:
                    worker.stop()
                    if working:
                        await asyncio.to_thread(thread.join, 10)
                    publishing.cancel()

        asyncio.run(main())

    return run
