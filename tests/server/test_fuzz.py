"""Thousands of malformed prompts, uploads, queries and WebSocket frames: every one gets an answer, none a 500.

    TACO_FUZZ=10000 pytest tests/server/test_fuzz.py        more than the ordinary run's
    TACO_FUZZ_SEED=7 ...                                    others

Everything is drawn from the seed, so a failure can be repeated. What is sent is in the failure's message.
"""

from __future__ import annotations

import asyncio
import copy
import io
import json
import os
import random

import aiohttp
import psutil
import pytest

COUNT = int(os.environ.get("TACO_FUZZ", "1500"))
SEED = int(os.environ.get("TACO_FUZZ_SEED", "1"))
GROWTH_MIB = 96
ODD = [
    None, True, False, 0, -1, 1.5, 1e308, -1e308, 2**63, 10**400, "", "1", "nan", "\0", "\ud800", "a" * 5000, "💥", "../x",
    [], [[]], ["1", 0], ["1", -1], ["1", 1e400], ["9", 0], ["1"], ["1", 0, 0], ["1", "0"], [1, 0], ["1", True], {}, {"a": {}},
    {"__value__": 1}, {"__value__": {"__value__": []}}, {"__type__": "INT"}, float("nan"), float("inf"),
]  # fmt: skip
KINDS = ["Echo", "LoadImage", "KSampler", "CLIPTextEncode", "EmptyLatentImage", "VAEDecode", "SaveImage", "LoraLoader",
         "KSamplerSelect", "BasicScheduler", "ImageScale", "Nothing", "", "__class__"]  # fmt: skip
VALID = {
    "prompt": {
        "1": {"class_type": "Echo", "inputs": {"value": 1, "kind": "a"}, "_meta": {"title": "echo"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "fuzz"}},
        "3": {"class_type": "LoadImage", "inputs": {"image": "nothing.png"}},
    },
    "client_id": "fuzz",
    "extra_data": {"extra_pnginfo": {"workflow": {"id": "w", "nodes": []}}},
    "number": 1,
    "partial_execution_targets": ["1"],
}
POSTS = ["/prompt", "/queue", "/history", "/interrupt", "/free", "/jobs/cancel", "/jobs/x/cancel", "/settings", "/settings/a",
         "/users", "/upload/image", "/upload/mask", "/userdata/a.json", "/userdata/a.json/move/b.json"]  # fmt: skip
GETS = ["/view", "/history", "/history/x", "/queue", "/jobs", "/jobs/x", "/userdata", "/v2/userdata", "/userdata/a.json",
        "/view_metadata/loras", "/object_info/Echo", "/models/loras", "/experiment/models/preview/loras/0/a",
        "/internal/files/output", "/templates/a.json", "/extensions/a/b.js", "/features"]  # fmt: skip
PARAMETERS = ["filename", "type", "subfolder", "preview", "channel", "max_items", "offset", "limit", "status", "sort_by",
              "sort_order", "workflow_id", "dir", "path", "recurse", "split", "full_info", "overwrite"]  # fmt: skip


class Fuzz:
    """One malformed thing after the other."""

    def __init__(self, seed):
        self.draw = random.Random(seed)

    def odd(self):
        value = copy.deepcopy(self.draw.choice(ODD))
        if self.draw.random() < 0.05:
            depth = self.draw.choice([10, 200, 100000])
            return json.loads("[" * 900 + "]" * 900) if depth > 900 else [[value] * 3] * depth
        return value

    def spoiled(self, value):
        """A copy with something in it replaced, removed or added, at any depth."""
        if not isinstance(value, dict | list) or not value or self.draw.random() < 0.25:
            return self.odd()
        value = copy.copy(value)
        key = self.draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        what = self.draw.random()
        if what < 0.1:
            del value[key]
        elif what < 0.2 and isinstance(value, dict):
            value[str(self.odd())] = value.pop(key)
        elif what < 0.3 and key == "class_type":
            value[key] = self.draw.choice(KINDS)
        else:
            value[key] = self.spoiled(value[key])
        return value

    def graph(self):
        """A prompt of random nodes with random links, circles included."""
        names = [str(i) for i in range(self.draw.randint(1, 12))]
        inputs = [
            "value",
            "kind",
            "images",
            "image",
            "model",
            "samples",
            "seed",
            "steps",
            "text",
            "clip",
            "sampler_name",
        ]
        prompt = {}
        for name in names:
            values = {key: [self.draw.choice(names), self.draw.randint(-1, 3)] if self.draw.random() < 0.6 else self.odd()
                      for key in self.draw.sample(inputs, self.draw.randint(0, 5))}  # fmt: skip
            prompt[name] = {"class_type": self.draw.choice(KINDS), "inputs": values}
        return {"prompt": prompt}

    def body(self):
        body = self.graph() if self.draw.random() < 0.4 else VALID
        for _ in range(self.draw.randint(0 if body is not VALID else 1, 3)):
            body = self.spoiled(body)
        text = json.dumps(body).encode()
        what = self.draw.random()
        if what < 0.1:
            text = text[: self.draw.randrange(len(text) + 1)]
        elif what < 0.15:
            at = self.draw.randrange(len(text) + 1)
            text = text[:at] + self.draw.randbytes(self.draw.randint(1, 9)) + text[at:]
        elif what < 0.17:
            text = b"[" * 200000
        return text

    def text(self):
        return str(self.odd()).encode("utf-8", "replace").decode()[:200]

    def form(self):
        """(content, content type) of an upload."""
        if self.draw.random() < 0.4:
            kind = self.draw.choice(["multipart/form-data; boundary=x", "multipart/form-data", "text/plain; charset=nothing",
                                     "application/x-www-form-urlencoded", "multipart/mixed; boundary=x"])  # fmt: skip
            parts = [b"--x", b"--x--", b"\r\n", b'Content-Disposition: form-data; name="image"; filename="a.png"', b"\0",
                     b"Content-Length: -1", b'Content-Disposition: form-data; name="', self.draw.randbytes(20),
                     b"Content-Transfer-Encoding: base64", b"Content-Encoding: gzip"]  # fmt: skip
            return b"\r\n".join(self.draw.choices(parts, k=self.draw.randint(0, 12))), kind
        form = aiohttp.FormData()
        for key in self.draw.sample(
            ["image", "type", "subfolder", "overwrite", "original_ref"], self.draw.randint(1, 5)
        ):
            if key == "image" or self.draw.random() < 0.2:
                name = "".join(c for c in self.text() if c.isprintable()) or "x"
                form.add_field(key, self.draw.randbytes(self.draw.randint(0, 200)), filename=name)
            else:
                form.add_field(
                    key, self.draw.choice([self.text(), "input", "temp", "true", '{"filename": "a.png"}', "[1]"])
                )
        return form, None

    def query(self):
        names = self.draw.sample(PARAMETERS, self.draw.randint(0, 4))
        values = ["1", "-5", "input", "a.png", "true", "webp;99999999999"]
        return {name: self.draw.choice([self.text(), *values]) for name in names}

    def frame(self):
        """Text or bytes for the WebSocket."""
        flags = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
        what = self.draw.random()
        if what < 0.5:
            return json.dumps(self.spoiled(flags))
        return self.draw.randbytes(self.draw.randint(0, 300)) if what < 0.8 else self.text()


async def send(api, fuzz):
    """Send one thing; a description of it, and the answer's status and text."""
    if fuzz.draw.random() < 0.2:
        path, query = fuzz.draw.choice(GETS), fuzz.query()
        async with api.client.get(path, params=query) as answer:
            return (path, query), answer.status, await answer.read()
    path = "/prompt" if fuzz.draw.random() < 0.5 else fuzz.draw.choice(POSTS)
    if path.startswith("/upload"):
        data, kind = fuzz.form()
        headers = {"Content-Type": kind} if kind else {}
        async with api.client.post(path, data=data, headers=headers) as answer:
            return (path, data, kind), answer.status, await answer.read()
    data, query = fuzz.body(), fuzz.query() if fuzz.draw.random() < 0.1 else {}
    body = io.BytesIO(data) if isinstance(data, bytes) else data  # aiohttp warns of large bytes
    async with api.client.post(path, data=body, params=query) as answer:
        return (path, data[:2000], query), answer.status, await answer.read()


async def talk(api, fuzz):
    """A page that sends a few frames of nonsense and leaves, politely or not."""
    ws = await api.client.ws_connect("/ws", params={"clientId": fuzz.text()})
    for _ in range(fuzz.draw.randint(0, 4)):
        frame = fuzz.frame()
        await (ws.send_bytes(frame) if isinstance(frame, bytes) else ws.send_str(frame))
    if fuzz.draw.random() < 0.5:
        await ws.close()
    else:
        ws._response.close()


@pytest.mark.timeout(600)
def test_nothing_malformed_brings_the_server_down(serve, caplog):
    caplog.set_level("CRITICAL")  # warnings about each bad prompt would be kept in memory otherwise
    fuzz, process = Fuzz(SEED), psutil.Process()
    sizes, statuses = [], {}

    async def body(api):
        tasks = len(asyncio.all_tasks())
        for turn in range(COUNT):
            if turn % 10 == 9:
                await talk(api, fuzz)
            else:
                what, status, answer = await send(api, fuzz)
                statuses[status] = statuses.get(status, 0) + 1
                assert status < 500, f"turn {turn}, seed {SEED}: {status} {answer[:500]!r} to {what!r}"
                if status == 400 and what[0] == "/prompt":
                    error = json.loads(answer)["error"]
                    assert error["type"] and error["message"], what
            if turn % 100 == 99:
                await api.json("POST", "/queue", json={"clear": True})
                await api.json("POST", "/history", json={"clear": True})
                sizes.append(process.memory_info().rss)
        for _ in range(100):
            if len(asyncio.all_tasks()) <= tasks + 1 and not api.server.sockets:
                break
            await asyncio.sleep(0.05)
        assert len(asyncio.all_tasks()) <= tasks + 1, [task.get_coro() for task in asyncio.all_tasks()]
        assert not api.server.sockets and not api.server.sockets_metadata
        good = {"prompt": {"1": {"class_type": "Echo", "inputs": {"value": 1, "kind": "a"}}}}
        prompt_id = (await api.json("POST", "/prompt", json=good))["prompt_id"]
        while not await api.json("GET", f"/history/{prompt_id}"):
            await asyncio.sleep(0.01)

    serve(body, seconds=580)
    assert statuses[200] > COUNT / 20 and statuses[400] > COUNT / 4, statuses
    assert sizes[-1] - sizes[len(sizes) // 3] < GROWTH_MIB * 2**20, [size >> 20 for size in sizes]
