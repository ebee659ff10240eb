"""Blending, blurring, sharpening and sizing pictures: [B, H, W, C] in 0..1."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

import node_helpers
from comfy_api.latest import io
from comfy_nodes.filters import gaussian_kernel, sharpening_kernel
from comfy_nodes.image import UPSCALE_METHODS, scaled
from comfy_nodes.v3 import extension, share

POST = "image/postprocessing"
DITHERS = ["none", "floyd-steinberg", "bayer-2", "bayer-4", "bayer-8", "bayer-16"]


def _soft_light(below: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
    """W3C compositing, section 10.1.9."""
    root = torch.where(below <= 0.25, ((16 * below - 12) * below + 4) * below, torch.sqrt(below))
    dark = below - (1 - 2 * above) * below * (1 - below)
    return torch.where(above <= 0.5, dark, below + (2 * above - 1) * (root - below))


BLENDS = {
    "normal": lambda below, above: above,
    "multiply": lambda below, above: below * above,
    "screen": lambda below, above: 1 - (1 - below) * (1 - above),
    "overlay": lambda below, above: torch.where(below <= 0.5, 2 * below * above, 1 - 2 * (1 - below) * (1 - above)),
    "soft_light": _soft_light,
    "difference": lambda below, above: below - above,
}


class Blend(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ImageBlend",
            category=POST,
            inputs=[
                io.Image.Input("image1"),
                io.Image.Input("image2"),
                share("blend_factor", 0.5),
                io.Combo.Input("blend_mode", options=list(BLENDS)),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, image1: torch.Tensor, image2: torch.Tensor, blend_factor: float, blend_mode: str):
        image1, image2 = node_helpers.image_alpha_fix(image1, image2)
        image2 = image2.to(image1.device)
        if image1.shape != image2.shape:
            image2 = scaled(image2, image1.shape[2], image1.shape[1], "bicubic", "center")
        blended = BLENDS[blend_mode](image1, image2)
        return io.NodeOutput((image1 * (1 - blend_factor) + blended * blend_factor).clamp(0, 1))

    blend_images = execute


def convolved(image: torch.Tensor, kernel: torch.Tensor, radius: int) -> torch.Tensor:
    """Every channel convolved with a square kernel; borders are mirrored."""
    channels = image.shape[-1]
    weights = kernel.to(image).repeat(channels, 1, 1).unsqueeze(1)
    padded = torch.nn.functional.pad(image.movedim(-1, 1), (radius,) * 4, "reflect")
    return torch.nn.functional.conv2d(padded, weights, groups=channels).movedim(1, -1)


class Blur(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ImageBlur",
            category=POST,
            inputs=[
                io.Image.Input("image"),
                io.Int.Input("blur_radius", default=1, min=1, max=31, step=1),
                share("sigma", 1.0, 10.0, 0.1, 0.1),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, blur_radius: int, sigma: float):
        return io.NodeOutput(convolved(image, gaussian_kernel(blur_radius, sigma), blur_radius))

    blur = execute


class Sharpen(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ImageSharpen",
            category=POST,
            inputs=[
                io.Image.Input("image"),
                io.Int.Input("sharpen_radius", default=1, min=1, max=31, step=1),
                share("sigma", 1.0, 10.0, 0.1),
                share("alpha", 1.0, 5.0),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, sharpen_radius: int, sigma: float, alpha: float):
        kernel = sharpening_kernel(sharpen_radius, sigma, alpha)
        return io.NodeOutput(convolved(image, kernel, sharpen_radius).clamp(0, 1))

    sharpen = execute


def bayer_matrix(order: int) -> np.ndarray:
    """Thresholds of ordered dithering around 0: `order` x `order`, doubled from 1 x 1."""
    matrix, cells = np.zeros((1, 1)), 1
    while matrix.shape[0] < order:
        cells *= 4
        grown = matrix * cells
        matrix = np.block([[grown - 1.5, grown + 0.5], [grown + 1.5, grown - 0.5]]) / cells
    return matrix


def _bayer(picture: Any, palette: Any, order: int) -> Any:
    """A picture in the colours of a palette, after adding the thresholds to its levels."""
    from PIL import Image

    spread = 2 * 256 / (len(palette.getpalette()) // 3)
    levels = np.asarray(picture).astype(np.float32)
    repeats = [-(-side // order) for side in levels.shape[:2]]
    pattern = np.tile(spread * bayer_matrix(order) + 0.5, repeats)[: levels.shape[0], : levels.shape[1], None]
    changed = (levels + pattern).clip(0, 255).astype(np.uint8)
    return Image.fromarray(changed).quantize(palette=palette, dither=Image.Dither.NONE)


class ImageQuantize(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ImageQuantize",
            category=POST,
            inputs=[
                io.Image.Input("image"),
                io.Int.Input("colors", default=256, min=1, max=256, step=1),
                io.Combo.Input("dither", options=DITHERS),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, colors: int, dither: str):
        """Each picture in a palette of its own."""
        from PIL import Image

        results = []
        for pixels in image[..., :3]:
            picture = Image.fromarray((pixels * 255).to(torch.uint8).cpu().numpy())
            palette = picture.quantize(colors=colors)
            if dither.startswith("bayer-"):
                reduced = _bayer(picture, palette, int(dither.removeprefix("bayer-")))
            else:
                kind = Image.Dither.NONE if dither == "none" else Image.Dither.FLOYDSTEINBERG
                reduced = picture.quantize(colors=colors, palette=palette, dither=kind)
            results.append(torch.from_numpy(np.array(reduced.convert("RGB"))).float() / 255)
        return io.NodeOutput(torch.stack(results))

    quantize = execute


class ImageScaleToTotalPixels(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ImageScaleToTotalPixels",
            category="image/upscaling",
            inputs=[
                io.Image.Input("image"),
                io.Combo.Input("upscale_method", options=UPSCALE_METHODS),
                share("megapixels", 1.0, 16.0, 0.01),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, upscale_method: str, megapixels: float):
        """A megapixel is 1024 x 1024."""
        rows, columns = image.shape[1:3]
        factor = math.sqrt(int(megapixels * 1024 * 1024) / (rows * columns))
        width, height = round(columns * factor), round(rows * factor)
        return io.NodeOutput(scaled(image, width, height, upscale_method, "disabled"))

    upscale = execute


comfy_entrypoint = extension(Blend, Blur, ImageQuantize, Sharpen, ImageScaleToTotalPixels)
