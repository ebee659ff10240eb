"""Saving pictures: nodes return before their files are complete, and nobody notices."""

from __future__ import annotations

import asyncio
import io
import os
import threading

import numpy as np
import pytest
import torch
from fakes import CALLS, make, node
from PIL import Image

import comfy_nodes.files
import execution
import folder_paths
import nodes
from comfy_execution import writers


@pytest.fixture
def output(tmp_path):
    folder_paths.set_output_directory(str(tmp_path))
    yield tmp_path
    folder_paths.set_base_directory(None)


@pytest.fixture
def slow(monkeypatch):
    """Encoding waits until the event is set; names of the threads that encode are kept."""
    go, threads = threading.Event(), []
    encode = comfy_nodes.files._encode_png

    def held(*arguments):
        threads.append(threading.current_thread())
        assert go.wait(10)
        encode(*arguments)

    monkeypatch.setattr(comfy_nodes.files, "_encode_png", held)
    monkeypatch.setattr(writers, "_threads", writers._Threads())
    go.threads = threads
    return go


def pictures(count):
    return torch.arange(count * 48, dtype=torch.float32).reshape(count, 4, 4, 3) / (count * 48)


def add(monkeypatch, name, function, inputs, returns=(), **more):
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, make(name, inputs, returns, function, **more))


@pytest.fixture
def prompt(monkeypatch, output, slow):
    """Two nodes that save a batch of two, and one that needs nothing of them and lets the encoding go on."""

    async def release(self, value):
        for _ in range(2000):  # until a file is being encoded, whichever node the executor took first
            if slow.threads:
                break
            await asyncio.sleep(0.005)
        CALLS.note(f"unfinished {sorted(os.listdir(output))}")
        slow.set()
        return {"ui": {"value": [value]}}

    add(monkeypatch, "Pictures", lambda self, count: (pictures(count),), {"count": ("INT", {})}, ("IMAGE",))
    add(monkeypatch, "Release", release, {"value": ("INT", {})}, OUTPUT_NODE=True)
    return {
        "p": node("Pictures", count=2),
        "one": node("SaveImage", images=["p", 0], filename_prefix="x"),
        "q": node("Pictures", count=1),
        "two": node("SaveImage", images=["q", 0], filename_prefix="x"),
        "same": node("SaveImage", images=["q", 0], filename_prefix="x"),
        "go": node("Release", value=1),
        "last": node("Release", value=2),
    }


def test_other_nodes_run_while_files_are_written(run, server, prompt, output):
    prompt["late"] = node("Release", value=["v", 0])
    prompt["v"] = node("Value", value=3)
    outputs = run(prompt)
    assert run.executor.success
    names = [f"x_{i:05}_.png" for i in (1, 2, 3)]
    assert [image["filename"] for key in ("one", "two") for image in outputs[key]["images"]] == names
    assert sorted(os.listdir(output)) == names
    seen = [what for what in CALLS.all if what.startswith("unfinished")]
    assert any(f"{name}.part" in what for what in seen for name in names), seen
    told = [(data["node"]) for data in server.of("executed")]
    assert {"one", "two", "same"} <= set(told)
    order = [event for event, _, _ in server.sent]
    assert order.index("execution_success") > max(i for i, event in enumerate(order) if event == "executed")
    assert run.executor.record.phases["save"] > 0


def test_the_bytes_are_those_of_pillow(run, prompt, output):
    run(prompt)
    info = Image.open(output / "x_00001_.png").text
    assert set(info) <= {"prompt", "workflow"}
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for key, text in info.items():
        chunks.add_text(key, text)
    for i, picture in enumerate(pictures(2)):
        expected = io.BytesIO()
        pixels = (255.0 * picture.numpy()).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(expected, format="PNG", pnginfo=chunks, compress_level=4)
        assert (output / f"x_{i + 1:05}_.png").read_bytes() == expected.getvalue()


def test_a_file_that_cannot_be_written_fails_the_prompt(run, server, prompt, output, slow, monkeypatch):
    def full(*arguments):
        slow.threads.append(threading.current_thread())
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(comfy_nodes.files, "_encode_png", full)
        outputs = run(prompt)
    error = server.of("execution_error")[0]
    assert error["node_id"] in ("one", "two", "same") and "No space left" in error["exception_message"]
    assert not server.of("execution_success") and not {"one", "two", "same"} & set(outputs)
    assert os.listdir(output) == []
    run(prompt)  # what failed is not taken from the cache
    assert len(os.listdir(output)) == 3


def test_who_calls_the_node_finds_the_files(run, prompt, output, monkeypatch, slow):
    """A pack's node that saves through SaveImage, a subclass, and a replaced function."""
    slow.set()
    found = []

    def through(self, images):
        saved = nodes.SaveImage().save_images(images, "y")
        found.append([os.path.exists(output / image["filename"]) for image in saved["ui"]["images"]])
        return saved

    class Mine(nodes.SaveImage):
        def save_images(self, images, filename_prefix="z", prompt=None, extra_pnginfo=None):
            saved = super().save_images(images, filename_prefix, prompt, extra_pnginfo)
            found.append([os.path.exists(output / image["filename"]) for image in saved["ui"]["images"]])
            return saved

    add(monkeypatch, "Through", through, {"images": ("IMAGE", {})}, OUTPUT_NODE=True)
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Mine", Mine)
    parts = {
        "p": prompt["p"],
        "t": node("Through", images=["p", 0]),
        "m": node("Mine", images=["p", 0], filename_prefix="z"),
    }
    run(parts)
    assert found == [[True, True]] * 2


def test_a_wrapped_execute_finds_the_files(run, prompt, output, monkeypatch, slow):
    slow.set()
    whole = execution.execute
    found = []

    async def watching(*arguments):
        result = await whole(*arguments)
        found.append(any(name.endswith(".part") for name in os.listdir(output)))
        return result

    monkeypatch.setattr(execution, "execute", watching)
    run(prompt)
    assert found and not any(found)


def test_pictures_of_a_batch_are_encoded_at_once(run, prompt, slow, output):
    run(prompt)
    assert len(slow.threads) == 3
    assert threading.main_thread() not in slow.threads
