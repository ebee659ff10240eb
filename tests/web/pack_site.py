"""A pack in a local git repository and the answers of the registry about it, for tests with the real ComfyUI-Manager."""

from __future__ import annotations

import functools
import http.server
import json
import os
import subprocess
import threading
from typing import Any
from urllib.parse import urlsplit

NAME, NODE = "packed-text", "PackedText"
REGISTRY = "https://api.comfy.org/"  # the page asks it itself
_CHANNEL = "https://raw.githubusercontent.com/ltdrdata/ComfyUI-Manager/main"
_PACK = """
class PackedText:
    RETURN_TYPES, OUTPUT_NODE, FUNCTION, CATEGORY = (), True, "say", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{"text": ("STRING", {{"default": "release"}})}}}}

    def say(self, text):
        return {{"ui": {{"text": [text + " {release}"]}}}}


NODE_CLASS_MAPPINGS = {{"PackedText": PackedText}}
"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Not on the console of the tests."""


class PackSite:
    """Serves the repository over HTTP while it is a context. `url` is what to clone, `entry` what the registry says."""

    def __init__(self, folder: str) -> None:
        self._bare = os.path.join(folder, NAME)
        self._work = os.path.join(folder, "work")
        os.makedirs(self._work)
        handler = functools.partial(_Quiet, directory=folder)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/{NAME}"
        self.entry = {
            "id": NAME, "name": "Packed text", "description": "One node.", "repository": self.url, "author": "tests",
            "publisher": {"id": "tests", "name": "tests"}, "status": "NodeStatusActive", "downloads": 1, "tags": [],
        }  # fmt: skip
        self._git("init", "--quiet", "-b", "main")
        self._git("clone", "--quiet", "--bare", self._work, self._bare)
        self._git("remote", "add", "origin", self._bare)
        self.publish(1)

    def _git(self, *words: str, at: str | None = None) -> None:
        who = ("-c", "user.name=tests", "-c", "user.email=tests@localhost")
        subprocess.run(["git", *who, *words], cwd=at or self._work, check=True, capture_output=True)

    def publish(self, release: int) -> None:
        """Commit a release of the pack, whose node says which it is."""
        with open(os.path.join(self._work, "__init__.py"), "w", encoding="utf-8") as file:
            file.write(_PACK.format(release=release))
        self._git("add", ".")
        self._git("commit", "--quiet", "-m", f"release {release}")
        self._git("push", "--quiet", "origin", "main")
        self._git("update-server-info", at=self._bare)

    def __enter__(self) -> PackSite:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def registry(self, url: str, body: Any) -> Any:
        """The registry's answer to the page."""
        path = urlsplit(url).path
        if path in ("/nodes", "/nodes/search"):
            return {"nodes": [self.entry], "total": 1, "page": 1, "limit": 30, "totalPages": 1}
        return {
            f"/nodes/{NAME}": self.entry,
            f"/nodes/{NAME}/versions": [],
            f"/comfy-nodes/{NODE}/node": self.entry,
        }.get(path)

    def configure(self, user: str) -> None:
        """Give a Manager whose user folder is `user` its settings and, as downloaded before, its lists."""
        folder = os.path.join(user, "__manager")
        os.makedirs(os.path.join(folder, "cache"))
        with open(os.path.join(folder, "config.ini"), "w", encoding="utf-8") as file:
            file.write("[default]\nnetwork_mode = offline\nuse_uv = false\nfile_logging = false\n")
        pack = {"author": "tests", "title": "Packed text", "reference": self.url, "files": [self.url],
                "install_type": "git-clone", "description": "One node."}  # fmt: skip
        lists: dict[str, Any] = {
            f"{_CHANNEL}/custom-node-list.json": {"custom_nodes": [pack]},
            f"{_CHANNEL}/extension-node-map.json": {self.url: [[NODE], {"title_aux": "Packed text"}]},
            f"{_CHANNEL}/github-stats.json": {},
            f"{_CHANNEL}/alter-list.json": {"items": []},
            REGISTRY + "nodes": {"nodes": [{**self.entry, "latest_version": {"version": "nightly"}}]},
        }
        for address, content in lists.items():
            file_name = f"{_hash(address)}_{os.path.basename(address)}.json"
            with open(os.path.join(folder, "cache", file_name), "w", encoding="utf-8") as file:
                json.dump(content, file)


def _hash(text: str) -> int:
    """The Manager's name of a cached address."""
    return functools.reduce(lambda value, letter: (value * 31 + ord(letter)) % 2**32, text, 0)


def workflow() -> dict[str, Any]:
    """A workflow, in the page's form, of the pack's one node."""
    node = {"id": 1, "type": NODE, "pos": [100, 100], "size": [220, 80], "flags": {}, "order": 0, "mode": 0, "inputs": [],
            "outputs": [], "properties": {"cnr_id": NAME, "Node name for S&R": NODE},
            "widgets_values": ["release"]}  # fmt: skip
    return {"nodes": [node], "links": [], "groups": [], "config": {}, "extra": {}, "version": 0.4,
            "last_node_id": 1, "last_link_id": 0}  # fmt: skip
