"""What a template lacks is told from the template alone."""

from __future__ import annotations

import json
import os
import re

import pytest

from app import template_requirements as requirements
from app.template_requirements import missing_of

LOADERS = {"UNETLoader", "CLIPLoader", "VAELoader", "CheckpointLoaderSimple", "LoraLoaderModelOnly", "KSampler"}


def node(kind: str, *values: object, **more: object) -> dict[str, object]:
    return {"type": kind, "widgets_values": list(values), **more}


def test_what_is_here_lacks_nothing():
    graph = {
        "nodes": [
            node("UNETLoader", "wan2.2_ti2v_5B_fp16.safetensors", "default"),
            node("CLIPLoader", "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan"),
            node("VAELoader", "wan2.2_vae.safetensors"),
            node("LoraLoaderModelOnly", "anything.safetensors", 1),
            node("Note", "text"),
        ]
    }
    assert missing_of(graph, LOADERS) == []


def test_family_format_and_node():
    graph = {
        "nodes": [
            node("UNETLoader", "sub/Z_Image_turbo_bf16.safetensors"),
            node("UNETLoader", "qwen_image_edit_2511_int8_convrot.safetensors"),
            node("CheckpointLoaderSimple", "somebodys.safetensors"),
            node("TextGenerate"),
        ]
    }
    missing = missing_of(graph, LOADERS)
    assert [(entry["kind"], entry["name"]) for entry in missing] == [
        ("family", "Z-Image"),
        ("family", "somebodys.safetensors"),
        ("format", "int8"),
        ("node", "TextGenerate"),
    ]
    assert "Z-Image is not in this version" in missing[0]["text"]
    own = missing_of(graph, LOADERS, official=False)
    assert [entry["name"] for entry in own] == ["Z-Image", "int8", "TextGenerate"], "files of one's own have any name"
    assert "Qwen-Image is in this version, but not its int8 format" in missing[2]["text"]


def test_what_is_switched_off_is_not_needed():
    inner = {"id": "in", "nodes": [node("UNETLoader", "flux1-dev.safetensors"), node("Far")]}
    outer = {"id": "out", "nodes": [node("in"), node("UNETLoader", "lens_bf16.safetensors", mode=4)]}
    unused = {"id": "unused", "nodes": [node("Never")]}
    graph = {"nodes": [node("out"), node("unused", mode=2)], "definitions": {"subgraphs": [inner, outer, unused]}}
    assert missing_of(graph, LOADERS) == [
        {"kind": "node", "name": "Far", "text": "the node Far is not in this version"},
    ]


def test_a_new_record_is_enough(monkeypatch):
    import comfy.families

    graph = {"nodes": [node("UNETLoader", "wan2.2_animate_14B.safetensors")]}
    absent = type("Record", (), {"models": {}})()
    monkeypatch.setattr(comfy.families, "records", lambda: (absent,))
    assert [entry["name"] for entry in missing_of(graph, LOADERS)] == ["Wan Animate"]
    absent.models["WAN22_Animate"] = object
    assert missing_of(graph, LOADERS) == []


def test_every_file_of_the_official_templates_is_known():
    from app.frontend_management import template_file

    index = template_file("index.json")
    if index is None:
        pytest.skip("the templates are not installed")
    with open(index, encoding="utf-8") as file:
        entries = [entry for group in json.load(file) for entry in group["templates"]]
    unknown = set()
    for entry in entries:
        path = os.path.join(os.path.dirname(index), entry["name"] + ".json")
        if entry.get("openSource", True) is False or not os.path.isfile(path):
            continue
        with open(path, encoding="utf-8") as file:
            files = requirements.files_of(json.load(file))
        for folder in ("checkpoints", "diffusion_models", "text_encoders", "vae"):
            unknown |= {name for name in files.get(folder, ()) if requirements.part_of_file(folder, name) is None}
    assert not unknown, "add these to the tables of app/template_requirements.py"


def test_the_route_says_what_the_page_on_it_shows(serve):
    """A file of one's own may have any name: nothing is said of it."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    with open(os.path.join(root, "docs/http_api.md"), encoding="utf-8") as file:
        part = file.read().split("\n## POST /taco_dit/missing\n")[1].split("\n## ")[0]
    asked = json.loads(re.search(r"'(\{.*\})'", part)[1])
    shown = json.loads(re.search(r"```json\n(.*?)```", part, re.DOTALL)[1])

    async def body(api):
        assert await api.json("POST", "/taco_dit/missing", json=asked) == shown
        asked["workflow"]["nodes"] = [node("UNETLoader", "my own mix.safetensors")]
        assert await api.json("POST", "/taco_dit/missing", json=asked) == {"missing": [], "text": ""}

    serve(body)
