"""Pictures and boxes drawn in the page."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import torch

import comfy.utils
import folder_paths
from comfy_api.latest import io, ui
from comfy_nodes.files import file_digest, open_picture
from comfy_nodes.v3 import extension

COLOR = re.compile(r"#?([0-9a-fA-F]{6})")
BOX_COLORS = ("#ff3b30", "#34c759", "#007aff", "#ff9500", "#af52de", "#5ac8fa")
# boxes of picture prompts are written in thousandths
UNIT = 1000


def color_of(text: str) -> tuple[float, ...]:
    """#rrggbb as three numbers in 0..1. Raises ValueError for anything else."""
    found = COLOR.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no colour; write it like #ff8800")
    return tuple(part / 255 for part in bytes.fromhex(found[1]))


class Painter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        def size(name: str) -> Any:
            return io.Int.Input(
                name, default=512, min=64, max=4096, step=64, socketless=True, extra_dict={"hidden": True}
            )

        drawing = io.String.Input(
            "mask", default="", socketless=True, extra_dict={"widgetType": "PAINTER", "image_upload": True}
        )
        color = io.Custom("COLOR").Input("bg_color", optional=True, extra_dict={"default": "#000000", "hidden": True})
        return io.Schema(
            node_id="Painter",
            display_name="Painter",
            category="image",
            description="A picture painted over in the page; without a picture, over a plain colour.",
            inputs=[io.Image.Input("image", optional=True), drawing, size("width"), size("height"), color],
            outputs=[io.Image.Output(display_name="IMAGE"), io.Mask.Output(display_name="MASK")],
        )

    @classmethod
    def execute(cls, mask: str, width: int, height: int, image: torch.Tensor | None = None, bg_color: str = "#000000"):
        """The drawing (a PNG the page uploaded) over the picture, and where it is opaque as the mask."""
        if image is None:
            below = torch.tensor(color_of(bg_color)).expand(1, height, width, 3)
        else:
            below = image[..., :3]
        height, width = below.shape[1:3]
        if not mask.strip():
            return io.NodeOutput(below, torch.zeros(1, height, width))
        with open_picture(mask) as picture:
            levels = np.array(picture.convert("RGBA"), dtype=np.float32) / 255.0
        drawing = torch.from_numpy(levels)[None].movedim(-1, 1)
        if drawing.shape[-2:] != (height, width):
            drawing = comfy.utils.common_upscale(drawing, width, height, "bilinear", "disabled")
        drawing = drawing.movedim(1, -1)
        opacity = drawing[..., 3:]
        return io.NodeOutput(below * (1 - opacity) + drawing[..., :3] * opacity, opacity[..., 0])

    @classmethod
    def fingerprint_inputs(cls, mask: str, **settings: Any):
        path = folder_paths.get_annotated_filepath(mask) if mask.strip() else None
        return mask if path is None or not folder_paths.exists_annotated_filepath(mask) else file_digest(path)


def _box(box: Any) -> dict[str, Any]:
    """A box in pixels, from any of the forms boxes come in."""
    if isinstance(box, dict) and {"x", "y", "width", "height"} <= box.keys():
        return box
    raise ValueError(f"{box!r} is no box; a box has x, y, width and height in pixels")


def boxes_of(value: Any) -> list[dict[str, Any]]:
    """Boxes of a list, of a box, or of either as JSON. Raises ValueError for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"the boxes are no JSON: {error}") from error
    value = [value] if isinstance(value, dict) else value or []
    while len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    return [_box(box) for box in value]


def element_of(box: dict[str, Any], width: int, height: int) -> dict[str, Any]:
    """A box as an element of a picture prompt: corners [top, left, bottom, right] in thousandths, and what is in it."""
    about = {**box.get("metadata", {})}
    edges = (
        (box["y"], height),
        (box["x"], width),
        (box["y"] + box["height"], height),
        (box["x"] + box["width"], width),
    )
    corners = [max(0, min(UNIT, round(UNIT * value / size))) for value, size in edges]
    element: dict[str, Any] = {"type": "text" if about.get("type") == "text" else "obj", "bbox": corners}
    if element["type"] == "text":
        element["text"] = about.get("text", "")
    element["desc"] = about.get("desc", "")
    if about.get("palette"):
        element["color_palette"] = list(about["palette"])[:5]
    return element


class CreateBoundingBoxes(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        editor = io.Custom("BOUNDING_BOXES").Input("editor_state", optional=True, extra_dict={"default": []})
        return io.Schema(
            node_id="CreateBoundingBoxes",
            display_name="Create Bounding Boxes",
            category="utils",
            description="Boxes drawn in the page, as boxes in pixels and as elements of a picture prompt.",
            inputs=[
                io.Image.Input("background", optional=True),
                io.MultiType.Input("bboxes", [io.BoundingBox, io.Array, io.String], optional=True),
                io.Int.Input("width", default=1024, min=64, max=16384, step=16),
                io.Int.Input("height", default=1024, min=64, max=16384, step=16),
                editor,
            ],
            outputs=[
                io.Image.Output(display_name="preview"),
                io.BoundingBox.Output(display_name="bboxes"),
                io.Array.Output(display_name="elements"),
            ],
        )

    @classmethod
    def execute(
        cls,
        width: int,
        height: int,
        background: torch.Tensor | None = None,
        bboxes: Any = None,
        editor_state: Any = None,
    ):
        """Boxes drawn in the page hold; those that come in are used while there are none."""
        if background is not None:
            height, width = background.shape[1:3]
        boxes = boxes_of(editor_state) or boxes_of(bboxes)
        preview = drawn(boxes, width, height, background)
        plain = [{key: box[key] for key in ("x", "y", "width", "height")} for box in boxes]
        elements = [element_of(box, width, height) for box in boxes]
        return io.NodeOutput(preview, [plain], elements, ui=ui.PreviewImage(preview, cls=cls))


def drawn(boxes: list[dict[str, Any]], width: int, height: int, background: torch.Tensor | None) -> torch.Tensor:
    """The boxes' outlines on the background, or on black: [1, H, W, 3]."""
    from PIL import Image, ImageDraw

    if background is None:
        picture = Image.new("RGB", (width, height))
    else:
        picture = Image.fromarray((background[0, ..., :3].cpu().numpy() * 255).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for number, box in enumerate(boxes):
        corners = (box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"])
        pen.rectangle(corners, outline=BOX_COLORS[number % len(BOX_COLORS)], width=max(2, min(width, height) // 256))
    return torch.from_numpy(np.array(picture).astype(np.float32) / 255.0)[None]


comfy_entrypoint = extension(Painter, CreateBoundingBoxes)
