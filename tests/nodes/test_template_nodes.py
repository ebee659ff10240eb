"""Nodes newer than ComfyUI 0.3.64 that the official templates use, and dynamic inputs of V3."""

from __future__ import annotations

import asyncio
import json
import struct
import zlib

import av
import numpy as np
import pytest
import torch
from PIL import Image

import folder_paths
from comfy_api.latest import io
from tests.nodes.helpers import run


@pytest.fixture
def folders(tmp_path):
    folder_paths.set_base_directory(str(tmp_path))
    for name in ("input", "output", "temp"):
        (tmp_path / name).mkdir()
    yield tmp_path
    folder_paths.set_base_directory(None)


def test_switches(all_nodes):
    node = all_nodes["ComfySwitchNode"]
    assert node.check_lazy_status(switch=True, on_false=1, on_true=None) == ["on_true"]
    assert node.check_lazy_status(switch=False, on_true=None) == []
    assert run(all_nodes, "ComfySwitchNode", switch=True, on_true=5) == (5,)
    assert run(all_nodes, "ComfySwitchNode", switch=False, on_true=5) == (None,)
    assert node.GET_NODE_INFO_V1()["output_matchtypes"] == ["switch"]
    assert run(all_nodes, "ComfyNotNode", value=[]) == (True,)
    assert run(all_nodes, "ComfyAndNode", **{"values.value0": 1, "values.value1": 0}) == (False,)
    assert run(all_nodes, "ComfyOrNode", **{"values.value0": 1, "values.value1": 0}) == (True,)
    assert run(all_nodes, "ComfyPassOrNoneNode", default=3) == (3, False)
    assert run(all_nodes, "ComfyPassOrNoneNode") == (None, True)
    assert run(all_nodes, "CustomCombo", choice="Turbo", index=2, option0="Turbo") == ("Turbo", 2)
    assert all_nodes["CustomCombo"].validate_inputs(choice="anything", option1="x") is True


def test_a_switch_computes_one_branch_only(all_nodes, folders):
    """Through the executor's validation: a match type takes any link."""
    import execution

    prompt = {
        "1": {"class_type": "PrimitiveInt", "inputs": {"value": 4}},
        "2": {"class_type": "ComfySwitchNode", "inputs": {"switch": True, "on_true": ["1", 0]}},
        "3": {"class_type": "ComfyMathExpression", "inputs": {"expression": "a * 2", "values.a": ["2", 0]}},
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 1]}},
    }
    valid, error, _, errors = asyncio.run(execution.validate_prompt("p", prompt, None))
    assert valid, (error, errors)
    prompt["3"]["inputs"] = {"expression": "a * 2", "values.a": "no number"}
    assert asyncio.run(execution.validate_prompt("p", prompt, None))[0]
    prompt["5"] = {"class_type": "BatchImagesNode", "inputs": {}}
    prompt["4"]["inputs"]["source"] = ["5", 0]
    valid, _, _, errors = asyncio.run(execution.validate_prompt("p", prompt, None))
    assert not valid and errors["5"]["errors"][0]["details"] == "images.image0"
    prompt["5"] = {
        "class_type": "SaveAudioAdvanced",
        "inputs": {"audio": ["1", 0], "filename_prefix": "x", "format": "ogg"},
    }
    valid, _, _, errors = asyncio.run(execution.validate_prompt("p", prompt, None))
    assert not valid and any("'ogg' not in" in found["details"] for found in errors["5"]["errors"])


def test_numbers(all_nodes):
    for expression, value in {
        "max(((a + 15) // 16) * 16, 256)": 304,
        "a & -8": 296,
        "sum(values) / 2": 155,
        "floor(a / 32) * 32": 288,
        "a > b": True,
        "pow(b, 2)": 100,
    }.items():
        result = run(all_nodes, "ComfyMathExpression", expression=expression, **{"values.a": 300, "values.b": 10})
        assert result == (float(value), int(value), bool(value)), expression
    for expression, reason in {
        "": "is empty",
        "c + 1": "cannot be computed",
        "'x'": "is no number",
        "1 / 0": "cannot",
        "1e308 * 10": "is not finite",
        "pow(2, 99999)": "exponent",
        "a +": "cannot",
    }.items():
        with pytest.raises(ValueError, match=reason):
            run(all_nodes, "ComfyMathExpression", expression=expression, **{"values.a": 1})
    odd = 2**53 + 1
    for value, numbers in {"12.5": (12.5, 12), True: (1.0, 1), -1.7: (-1.7, -1), f" {odd} ": (2.0**53, odd)}.items():
        assert run(all_nodes, "ComfyNumberConvert", value=value) == numbers
    with pytest.raises(ValueError, match="'tree' is no number"):
        run(all_nodes, "ComfyNumberConvert", value="tree")
    assert run(all_nodes, "SeedNode", seed=7) == (7,)
    assert run(all_nodes, "ResolutionSelector", aspect_ratio="1:1 (Square)", megapixels=1.0) == (1024, 1024)
    assert run(all_nodes, "ResolutionSelector", aspect_ratio="16:9 (Widescreen)", megapixels=0.9, multiple=32) == (
        1280,
        736,
    )


def test_texts_of_json(all_nodes):
    content = json.dumps({"Turbo": {"mu": 0.5}, "n": 3, "none": None, "text": "é"})

    def read(key, text=content):
        return run(all_nodes, "JsonExtractString", json_string=text, key=key)[0]

    assert read("mu", read("Turbo")) == "0.5" and read("n") == "3" and read("text") == "é"
    assert read("none") == read("missing") == read("a", "no json") == ""


@pytest.mark.parametrize(
    ("choice", "inputs", "size"),
    [
        ("scale dimensions", {"width": 20, "height": 0, "crop": "center"}, (20, 10)),
        ("scale dimensions", {"width": 20, "height": 20, "crop": "center"}, (20, 20)),
        ("scale by multiplier", {"multiplier": 1.5}, (60, 30)),
        ("scale longer dimension", {"longer_size": 80}, (80, 40)),
        ("scale shorter dimension", {"shorter_size": 40}, (80, 40)),
        ("scale width", {"width": 10}, (10, 5)),
        ("scale height", {"height": 10}, (20, 10)),
        ("scale total pixels", {"megapixels": 0.01}, (145, 72)),
        ("match size", {"match": torch.zeros(1, 7, 9), "crop": "disabled"}, (9, 7)),
        ("scale to multiple", {"multiple": 16}, (32, 16)),
    ],
)
def test_sizes(all_nodes, choice, inputs, size):
    given = {"resize_type": choice, **{f"resize_type.{name}": value for name, value in inputs.items()}}
    for x in (torch.rand(2, 20, 40, 3), torch.rand(2, 20, 40)):
        out = run(all_nodes, "ResizeImageMaskNode", input=x, scale_method="bilinear", **given)[0]
        assert (out.shape[2], out.shape[1]) == size and out.ndim == x.ndim


def test_what_a_choice_needs(all_nodes):
    image = torch.rand(1, 4, 4, 3)
    out = run(all_nodes, "ResizeImageMaskNode", input=image, scale_method="area", resize_type="scale longer dimension")
    assert out[0].shape[1] == 512  # the default
    with pytest.raises(
        ValueError, match="'resize_type.match' is missing; it is needed when resize_type is 'match size'"
    ):
        run(all_nodes, "ResizeImageMaskNode", input=image, scale_method="area", resize_type="match size")
    with pytest.raises(ValueError, match="choose one of 'scale dimensions'"):
        run(all_nodes, "ResizeImageMaskNode", input=image, scale_method="area", resize_type="shrink")


def test_batches(all_nodes):
    images = {"images.image0": torch.zeros(1, 4, 6, 3), "images.image1": torch.ones(2, 8, 8, 4)}
    batch = run(all_nodes, "BatchImagesNode", **images)[0]
    assert batch.shape == (3, 4, 6, 4) and batch[0, ..., 3].min() == 1
    with pytest.raises(ValueError, match="'images.image0' is missing"):
        run(all_nodes, "BatchImagesNode")
    masks = {"masks.mask0": torch.zeros(1, 4, 6), "masks.mask1": torch.ones(1, 8, 8)}
    assert run(all_nodes, "BatchMasksNode", **masks)[0].shape == (2, 4, 6)
    latents = {
        "latents.latent0": {"samples": torch.zeros(1, 4, 8, 8), "batch_index": [7]},
        "latents.latent1": {"samples": torch.ones(2, 4, 4, 4)},
    }
    out = run(all_nodes, "BatchLatentsNode", **latents)[0]
    assert out["samples"].shape == (3, 4, 8, 8) and out["batch_index"] == [7, 0, 1]
    for name, group in (("mask", masks), ("latent", latents), ("image", images)):
        renamed = {key.replace(f"{name}s.{name}", "inputs.input"): value for key, value in group.items()}
        assert run(all_nodes, "BatchImagesMasksLatentsNode", **renamed)
    with pytest.raises(ValueError, match="cannot be one batch"):
        run(
            all_nodes,
            "BatchLatentsNode",
            **{
                "latents.latent0": {"samples": torch.zeros(1, 4, 8, 8)},
                "latents.latent1": {"samples": torch.zeros(1, 16, 8, 8)},
            },
        )


def test_dynamic_inputs_in_each_other():
    inner = io.DynamicCombo.Input(
        "inner",
        options=[io.DynamicCombo.Option("x", [io.Float.Input("f", default=1.5)]), io.DynamicCombo.Option("y", [])],
    )
    grown = io.Autogrow.Input("more", template=io.Autogrow.TemplateNames(io.Image.Input("i"), names=["a", "b"], min=1))

    class Both(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(
                node_id="Both",
                outputs=[io.AnyType.Output()],
                inputs=[
                    io.DynamicCombo.Input(
                        "outer",
                        options=[io.DynamicCombo.Option("one", [inner]), io.DynamicCombo.Option("two", [grown])],
                    )
                ],
            )

        @classmethod
        def validate_inputs(cls, outer):
            return outer["outer"] == "one"

        @classmethod
        def execute(cls, outer):
            return io.NodeOutput(outer)

    assert Both.EXECUTE_NORMALIZED(**{"outer": "one", "outer.inner": "x"}) == (
        {"outer": "one", "inner": {"inner": "x", "f": 1.5}},
    )
    assert Both.EXECUTE_NORMALIZED(**{"outer": "two", "outer.more.a": 4}) == ({"outer": "two", "more": {"a": 4}},)
    assert Both.PREPARE_CLASS_CLONE({}).validate_inputs(**{"outer": "two", "outer.more.a": 4}) is False
    assert {"outer.inner", "outer.inner.f", "outer.more.a", "outer.more.b"} <= Both.INPUT_TYPES()["optional"].keys()
    info = Both.GET_NODE_INFO_V1()["input"]["required"]["outer"]
    assert info[0] == "COMFY_DYNAMICCOMBO_V3" and [option["key"] for option in info[1]["options"]] == ["one", "two"]
    with pytest.raises(ValueError, match="dynamic input cannot be"):
        io.Autogrow.TemplatePrefix(inner, prefix="p")


def test_pictures_in_formats(all_nodes, folders):
    image = torch.rand(1, 8, 10, 3)
    clone = all_nodes["SaveImageAdvanced"].PREPARE_CLASS_CLONE({"PROMPT": {"1": {}}, "EXTRA_PNGINFO": {"workflow": {}}})

    def save(**settings):
        result = clone.EXECUTE_NORMALIZED(images=image, filename_prefix="p", **settings)
        return folders / "output" / result["ui"]["images"][0]["filename"]

    eight = save(**{"format": "png", "format.bit_depth": "8-bit"})
    assert Image.open(eight).text["prompt"] == '{"1": {}}'
    deep = save(**{"format": "png", "format.bit_depth": "16-bit"}).read_bytes()
    assert struct.unpack(">IIBB", deep[16:26]) == (10, 8, 16, 2)
    path = folders / "output/p_00002_.png"
    with Image.open(path) as picture:
        assert json.loads(picture.text["workflow"]) == {}
    with av.open(str(path)) as file:
        levels = next(file.decode(video=0)).to_ndarray(format="rgb48le")
    assert np.abs(levels / 65535 - image[0].numpy()).max() < 1e-4
    assert zlib.crc32(deep[12:29]) == struct.unpack(">I", deep[29:33])[0]
    exr = save(format="exr")
    with av.open(str(exr)) as file:
        planes = next(file.decode(video=0)).to_ndarray(format="gbrpf32le")
    expected = torch.where(image[0] <= 0.04045, image[0] / 12.92, ((image[0] + 0.055) / 1.055) ** 2.4)
    assert np.abs(planes - expected.numpy()).max() < 1e-4
    shown = run(all_nodes, "ImageCompare", image_a=image)["ui"]
    assert len(shown["a_images"]) == 1 and shown["b_images"] == []


def test_drawings(all_nodes, folders):
    drawing = np.zeros((4, 6, 4), dtype=np.uint8)
    drawing[:2] = (255, 0, 0, 255)
    Image.fromarray(drawing).save(folders / "input/d.png")
    image, mask = run(all_nodes, "Painter", mask="d.png [input]", width=64, height=64, image=torch.ones(1, 4, 6, 3))
    assert image[0, 0, 0].tolist() == [1, 0, 0] and image[0, 3, 0].tolist() == [1, 1, 1] and mask.sum() == 12
    plain, mask = run(all_nodes, "Painter", mask="", width=64, height=128, bg_color="#ff0080")
    assert plain.shape == (1, 128, 64, 3) and plain[0, 0, 0].tolist() == pytest.approx([1, 0, 128 / 255])
    with pytest.raises(ValueError, match="'red' is no colour"):
        run(all_nodes, "Painter", mask="", width=64, height=64, bg_color="red")
    box = {"x": 10, "y": 20, "width": 30, "height": 40, "metadata": {"type": "text", "text": "A", "desc": "big"}}
    result = run(all_nodes, "CreateBoundingBoxes", width=100, height=200, editor_state=[box])
    preview, boxes, elements = result["result"]
    assert preview.shape == (1, 200, 100, 3) and preview.sum() > 0
    assert boxes == [[{"x": 10, "y": 20, "width": 30, "height": 40}]]
    assert elements == [{"type": "text", "bbox": [100, 100, 300, 400], "text": "A", "desc": "big"}]
    taken = run(all_nodes, "CreateBoundingBoxes", width=100, height=200, bboxes=json.dumps(boxes[0]))
    assert taken["result"][1] == boxes
    with pytest.raises(ValueError, match="is no box"):
        run(all_nodes, "CreateBoundingBoxes", width=100, height=200, bboxes="[1]")
