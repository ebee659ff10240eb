"""Pictures and masks resized by several rules, and batches of as many as are connected."""

from __future__ import annotations

import math
from typing import Any

import torch

import comfy.utils
from comfy_api.latest import io
from comfy_nodes.fields import MAX_RESOLUTION
from comfy_nodes.image import UPSCALE_METHODS
from comfy_nodes.v3 import extension, share

Size = tuple[int, int]
DIMENSIONS, FACTOR, LONGER, SHORTER = (
    "scale dimensions",
    "scale by multiplier",
    "scale longer dimension",
    "scale shorter dimension",
)
WIDTH, HEIGHT, PIXELS, MATCH, MULTIPLE = (
    "scale width",
    "scale height",
    "scale total pixels",
    "match size",
    "scale to multiple",
)


def pixels(name: str) -> Any:
    return io.Int.Input(name, default=512, min=0, max=MAX_RESOLUTION, step=1)


def _choices() -> list[Any]:
    crop = io.Combo.Input(
        "crop",
        options=["disabled", "center"],
        default="center",
        tooltip="Where the shape differs: stretched, or cut to the middle.",
    )
    option = io.DynamicCombo.Option
    return [
        option(DIMENSIONS, [pixels("width"), pixels("height"), crop]),
        option(FACTOR, [share("multiplier", 1.0, 8.0, 0.01)]),
        option(LONGER, [pixels("longer_size")]),
        option(SHORTER, [pixels("shorter_size")]),
        option(WIDTH, [pixels("width")]),
        option(HEIGHT, [pixels("height")]),
        option(PIXELS, [share("megapixels", 1.0, 16.0, 0.01)]),
        option(MATCH, [io.MultiType.Input("match", [io.Image, io.Mask]), crop]),
        option(MULTIPLE, [io.Int.Input("multiple", default=8, min=1, max=MAX_RESOLUTION, step=1)]),
    ]


def _planes(x: torch.Tensor) -> torch.Tensor:
    """A picture [B, H, W, C] or mask [B, H, W] as [B, C, H, W]."""
    return x.movedim(-1, 1) if x.ndim == 4 else x.unsqueeze(1)


def _resized(x: torch.Tensor, width: int, height: int, method: str, crop: str) -> torch.Tensor:
    if width < 1 or height < 1:
        raise ValueError(f"a size of {width} x {height} pixels has no pixels; use larger values")
    scaled = comfy.utils.common_upscale(_planes(x), width, height, method, crop)
    return scaled.movedim(1, -1) if x.ndim == 4 else scaled.squeeze(1)


def _fitted(size: Size, width: int, height: int) -> Size:
    """A side of 0 follows from the other one."""
    if width == 0:
        return max(1, round(size[0] * height / size[1])), height
    return width, height if height else max(1, round(size[1] * width / size[0]))


def target_size(size: Size, rule: dict[str, Any]) -> Size:
    """Width and height after a rule."""
    width, height = size
    kind = rule["resize_type"]
    if kind == FACTOR:
        return round(width * rule["multiplier"]), round(height * rule["multiplier"])
    if kind in (LONGER, SHORTER):
        side = rule["longer_size" if kind == LONGER else "shorter_size"]
        by_width = (width > height) == (kind == LONGER)
        return _fitted(size, side, 0) if by_width else _fitted(size, 0, side)
    if kind == PIXELS:
        factor = math.sqrt(int(rule["megapixels"] * 1024 * 1024) / (width * height))
        return max(1, round(width * factor)), max(1, round(height * factor))
    if kind == MATCH:
        other = _planes(rule["match"])
        return other.shape[-1], other.shape[-2]
    if rule.get("width", 0) == 0 and rule.get("height", 0) == 0:
        return size
    return _fitted(size, rule.get("width", 0), rule.get("height", 0))


def covered(x: torch.Tensor, step: int, method: str) -> torch.Tensor:
    """Scaled to just cover the largest multiple of `step` within, then cut to it around the middle."""
    height, width = x.shape[1:3]
    across, down = width // step * step, height // step * step
    if 0 in (across, down) or (across, down) == (width, height):
        return x
    factor = max(across / width, down / height)
    scaled = _resized(
        x,
        max(across, math.ceil(width * factor - 1e-9)),
        max(down, math.ceil(height * factor - 1e-9)),
        method,
        "disabled",
    )
    top, left = (scaled.shape[1] - down) // 2, (scaled.shape[2] - across) // 2
    return scaled[:, top : top + down, left : left + across]


class ResizeImageMaskNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        kind = io.MatchType.Template("input_type", [io.Image, io.Mask])
        return io.Schema(
            node_id="ResizeImageMaskNode",
            display_name="Resize Image/Mask",
            category="transform",
            description="Resizes a picture or a mask.",
            inputs=[
                io.MatchType.Input("input", template=kind),
                io.DynamicCombo.Input("resize_type", options=_choices()),
                io.Combo.Input("scale_method", options=UPSCALE_METHODS, default="area"),
            ],
            outputs=[io.MatchType.Output(template=kind, display_name="resized")],
        )

    @classmethod
    def execute(cls, input: torch.Tensor, resize_type: dict[str, Any], scale_method: str):
        if resize_type["resize_type"] == MULTIPLE:
            return io.NodeOutput(covered(input, resize_type["multiple"], scale_method))
        size = (input.shape[2], input.shape[1])
        target = target_size(size, resize_type)
        if target == size and resize_type["resize_type"] == DIMENSIONS:
            return io.NodeOutput(input)
        return io.NodeOutput(_resized(input, *target, scale_method, resize_type.get("crop", "disabled")))


# ---- batches ---------------------------------------------------------------------------------------------------------


def batch_images(images: list[torch.Tensor]) -> torch.Tensor:
    """One batch of the first picture's size; pictures without alpha are opaque beside those with it."""
    channels = max(image.shape[-1] for image in images)
    full = [torch.nn.functional.pad(image, (0, channels - image.shape[-1]), value=1.0) for image in images]
    height, width = full[0].shape[1:3]
    return torch.cat(
        [
            image if image.shape[1:3] == (height, width) else _resized(image, width, height, "bilinear", "center")
            for image in full
        ]
    )


def batch_masks(masks: list[torch.Tensor]) -> torch.Tensor:
    """One batch of the first mask's size."""
    return batch_images([mask.unsqueeze(-1) for mask in masks]).squeeze(-1)


def batch_latents(latents: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch of the first latent's size."""
    first = latents[0]["samples"]
    samples, numbers = [], []
    for latent in latents:
        x = latent["samples"]
        numbers += latent.get("batch_index", range(x.shape[0]))
        if x.shape[1:] != first.shape[1:]:
            if x.ndim != 4 or x.shape[1] != first.shape[1]:
                raise ValueError(
                    f"latents of shapes {list(first.shape)} and {list(x.shape)} are of different models or lengths and "
                    "cannot be one batch"
                )
            x = comfy.utils.common_upscale(x, first.shape[-1], first.shape[-2], "bilinear", "center")
        samples.append(x)
    return {**latents[0], "samples": torch.cat(samples), "batch_index": numbers}


def batch_anything(values: list[Any]) -> Any:
    """A batch of whatever the first value is."""
    if isinstance(values[0], dict):
        return batch_latents(values)
    return batch_images(values) if values[0].ndim == 4 else batch_masks(values)


def batch_node(node_id: str, title: str, category: str, kind: Any, name: str, function: Any) -> type[io.ComfyNode]:
    """A node that makes one batch of all its inputs."""

    class Batch(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            match = io.MatchType.Template(name, [io.Image, io.Mask, io.Latent]) if kind is io.MatchType else None
            one = io.MatchType.Input(name, template=match) if match else kind.Input(name)
            grown = io.Autogrow.TemplatePrefix(one, prefix=name, min=1, max=50)
            output = io.MatchType.Output(template=match) if match else kind.Output()
            return io.Schema(
                node_id=node_id,
                display_name=title,
                category=category,
                inputs=[io.Autogrow.Input(f"{name}s", template=grown)],
                outputs=[output],
            )

        @classmethod
        def execute(cls, **given: dict[str, Any]):
            return io.NodeOutput(function(list(given[f"{name}s"].values())))

    Batch.__name__ = Batch.__qualname__ = node_id
    return Batch


BatchImages = batch_node("BatchImagesNode", "Batch Images", "image", io.Image, "image", batch_images)
BatchMasks = batch_node("BatchMasksNode", "Batch Masks", "mask", io.Mask, "mask", batch_masks)
BatchLatents = batch_node("BatchLatentsNode", "Batch Latents", "latent", io.Latent, "latent", batch_latents)
BatchAnything = batch_node(
    "BatchImagesMasksLatentsNode", "Batch Images/Masks/Latents", "utils", io.MatchType, "input", batch_anything
)

comfy_entrypoint = extension(ResizeImageMaskNode, BatchImages, BatchMasks, BatchLatents, BatchAnything)
