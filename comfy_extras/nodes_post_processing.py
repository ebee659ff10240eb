"""Blending, blurring, sharpening and sizing pictures: [B, H, W, C] in 0..1."""

from __future__ import annotations

import math

import torch

import node_helpers
from comfy_api.latest import io
from comfy_nodes.filters import gaussian_kernel, sharpening_kernel
from comfy_nodes.image import UPSCALE_METHODS, scaled
from comfy_nodes.v3 import extension, share

POST = "image/postprocessing"


def _soft_light(below: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
    """W3C compositing, section 10.1.9."""
    root = torch.where(below <= 0.25, ((16 * below - 12) * below + 4) * below, torch.sqrt(below))
    dark = below - (1 - 2 * above) * below * (1 - below)
    return torch.where(above <= 0.5, dark, below + (2 * above - 1) * (root - below))


BLENDS = {
    "normal": lambda below, above: above,
    "multiply": lambda below, above: below * above,
    "screen": lambda below, above: 1 - (1 - below) * (1 - above),
    "overlay": lambda below, above: torch.where(
        below <= 0.5, 2 * below * above, 1 - 2 * (1 - below) * (1 - above)
    ),
    "soft_light": _soft_light,
    "difference": lambda below, above: below - above,
}


class Blend(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ImageBlend", category=POST,
            inputs=[
                io.Image.Input("image1"), io.Image.Input("image2"), share("blend_factor", 0.5),
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
            node_id="ImageBlur", category=POST,
            inputs=[
                io.Image.Input("image"), io.Int.Input("blur_radius", default=1, min=1, max=31, step=1),
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
            node_id="ImageSharpen", category=POST,
            inputs=[
                io.Image.Input("image"), io.Int.Input("sharpen_radius", default=1, min=1, max=31, step=1),
                share("sigma", 1.0, 10.0, 0.1), share("alpha", 1.0, 5.0),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, sharpen_radius: int, sigma: float, alpha: float):
        kernel = sharpening_kernel(sharpen_radius, sigma, alpha)
        return io.NodeOutput(convolved(image, kernel, sharpen_radius).clamp(0, 1))

    sharpen = execute


class ImageScaleToTotalPixels(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ImageScaleToTotalPixels", category="image/upscaling",
            inputs=[
                io.Image.Input("image"), io.Combo.Input("upscale_method", options=UPSCALE_METHODS),
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


comfy_entrypoint = extension(Blend, Blur, Sharpen, ImageScaleToTotalPixels)
