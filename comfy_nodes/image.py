"""Nodes on pictures: [B, H, W, C] float in 0..1."""

from __future__ import annotations

import torch

import comfy.utils
from comfy_nodes.fields import MAX_RESOLUTION, number, pixels, whole

UPSCALE_METHODS = ["nearest-exact", "bilinear", "area", "bicubic", "lanczos"]
CROP_METHODS = ["disabled", "center"]


def scaled(image: torch.Tensor, width: int, height: int, method: str, crop: str) -> torch.Tensor:
    """`comfy.utils.common_upscale` for channels-last images."""
    return comfy.utils.common_upscale(image.movedim(-1, 1), width, height, method, crop).movedim(1, -1)


class ImageScale:
    upscale_methods = UPSCALE_METHODS
    crop_methods = CROP_METHODS

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "image": ("IMAGE",),
                "upscale_method": (cls.upscale_methods,),
                "width": pixels(512, 0, 1),
                "height": pixels(512, 0, 1),
                "crop": (cls.crop_methods,),
            }
        }

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "upscale"
    CATEGORY = "image/upscaling"

    def upscale(self, image: torch.Tensor, upscale_method: str, width: int, height: int, crop: str):
        """A side of 0 follows from the other one; with both 0 nothing changes."""
        if width == 0 and height == 0:
            return (image,)
        rows, columns = image.shape[1:3]
        width = width or max(1, round(columns * height / rows))
        height = height or max(1, round(rows * width / columns))
        return (scaled(image, width, height, upscale_method, crop),)


class ImageScaleBy:
    upscale_methods = UPSCALE_METHODS

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "image": ("IMAGE",),
                "upscale_method": (cls.upscale_methods,),
                "scale_by": number(1.0, 0.01, 8.0, 0.01),
            }
        }

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "upscale"
    CATEGORY = "image/upscaling"

    def upscale(self, image: torch.Tensor, upscale_method: str, scale_by: float):
        height, width = (round(side * scale_by) for side in image.shape[1:3])
        return (scaled(image, width, height, upscale_method, "disabled"),)


class ImageInvert:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",)}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "invert"
    CATEGORY = "image"

    def invert(self, image: torch.Tensor):
        return (1.0 - image,)


class ImageBatch:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image1": ("IMAGE",), "image2": ("IMAGE",)}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "batch"
    CATEGORY = "image"

    def batch(self, image1: torch.Tensor, image2: torch.Tensor):
        """Both in one batch; the second is scaled and cropped to the first's size, and alpha added where one lacks it."""
        channels = max(image1.shape[-1], image2.shape[-1])
        image1, image2 = (
            torch.nn.functional.pad(image, (0, channels - image.shape[-1]), value=1.0) for image in (image1, image2)
        )
        if image1.shape[1:] != image2.shape[1:]:
            image2 = scaled(image2, image1.shape[2], image1.shape[1], "bilinear", "center")
        return (torch.cat((image1, image2), dim=0),)


class EmptyImage:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "width": pixels(512, 1, 1),
                "height": pixels(512, 1, 1),
                "batch_size": whole(1, 1, 4096),
                "color": whole(0, 0, 0xFFFFFF, 1, display="color"),
            }
        }

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "generate"
    CATEGORY = "image"

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def generate(self, width: int, height: int, batch_size: int = 1, color: int = 0):
        """`color` is 0xRRGGBB."""
        shades = torch.tensor([color >> 16 & 0xFF, color >> 8 & 0xFF, color & 0xFF], device=self.device) / 255
        return (shades.expand(batch_size, height, width, 3).contiguous(),)


class ImagePadForOutpaint:
    @classmethod
    def INPUT_TYPES(cls):
        sides = {side: pixels(0) for side in ("left", "top", "right", "bottom")}
        return {"required": {"image": ("IMAGE",), **sides, "feathering": pixels(40, 0, 1)}}

    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "expand_image"
    CATEGORY = "image"

    def expand_image(self, image: torch.Tensor, left: int, top: int, right: int, bottom: int, feathering: int):
        """The image on a larger grey one, and a mask that is 1 outside of it, fading inwards over `feathering` pixels."""
        batch, rows, columns, channels = image.shape
        canvas = torch.full((batch, rows + top + bottom, columns + left + right, channels), 0.5)
        canvas[:, top : top + rows, left : left + columns] = image
        mask = torch.ones(canvas.shape[1:3])
        inner = torch.zeros(rows, columns)
        if 0 < feathering * 2 < min(rows, columns):
            far = float(max(rows, columns))
            y = torch.arange(rows, dtype=torch.float32)[:, None]
            x = torch.arange(columns, dtype=torch.float32)[None, :]
            distance = torch.full((rows, columns), far)
            for padded, away in ((top, y), (bottom, rows - y), (left, x), (right, columns - x)):
                if padded:
                    distance = torch.minimum(distance, away.expand(rows, columns))
            inner = ((feathering - distance) / feathering).clamp(min=0) ** 2
        mask[top : top + rows, left : left + columns] = inner
        return (canvas, mask.unsqueeze(0))


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls for cls in (ImageScale, ImageScaleBy, ImageInvert, ImageBatch, ImagePadForOutpaint, EmptyImage)
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "ImageScale": "Upscale Image",
    "ImageScaleBy": "Upscale Image By",
    "ImageInvert": "Invert Image",
    "ImageBatch": "Batch Images",
    "ImagePadForOutpaint": "Pad Image for Outpainting",
}
__all__ = ["MAX_RESOLUTION", "NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "scaled"]
