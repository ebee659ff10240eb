"""Cutting, turning, joining and saving pictures: [B, H, W, C] in 0..1."""

from __future__ import annotations

import io
import json
import os
import re
from types import SimpleNamespace
from typing import Any

import torch

import folder_paths
from comfy_api.latest._types import FolderType
from comfy_api.latest.ui import ImageSaveHelper
from comfy_nodes.fields import number, pixels, seed, whole
from comfy_nodes.files import metadata_texts
from comfy_nodes.image import scaled

PNG_INFO = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}


class ImageCrop:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "image": ("IMAGE",),
                "width": pixels(512, 1, 1),
                "height": pixels(512, 1, 1),
                "x": pixels(0, 0, 1),
                "y": pixels(0, 0, 1),
            }
        }

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "crop"
    CATEGORY = "image/transform"

    def crop(self, image: torch.Tensor, width: int, height: int, x: int, y: int):
        x, y = min(x, image.shape[2] - 1), min(y, image.shape[1] - 1)
        return (image[:, y : y + height, x : x + width],)


class RepeatImageBatch:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "amount": whole(1, 1, 4096)}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "repeat"
    CATEGORY = "image/batch"

    def repeat(self, image: torch.Tensor, amount: int):
        return (image.repeat(amount, 1, 1, 1),)


class ImageFromBatch:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "batch_index": whole(0, 0, 4095), "length": whole(1, 1, 4096)}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "frombatch"
    CATEGORY = "image/batch"

    def frombatch(self, image: torch.Tensor, batch_index: int, length: int):
        start = min(image.shape[0] - 1, batch_index)
        return (image[start : start + length].clone(),)


class ImageAddNoise:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "seed": seed(), "strength": number(0.5, 0.0, 1.0, 0.01)}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "repeat"
    CATEGORY = "image"

    def repeat(self, image: torch.Tensor, seed: int, strength: float):
        noise = torch.randn(image.size(), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        return ((image + strength * noise.to(image)).clip(0.0, 1.0),)


class ImageRotate:
    _TURNS = {"none": 0, "90 degrees": 1, "180 degrees": 2, "270 degrees": 3}

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "rotation": (list(cls._TURNS),)}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "rotate"
    CATEGORY = "image/transform"

    def rotate(self, image: torch.Tensor, rotation: str):
        """Clockwise."""
        return (torch.rot90(image, k=self._TURNS[rotation], dims=(2, 1)),)


class ImageFlip:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "flip_method": (["x-axis: vertically", "y-axis: horizontally"],)}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "flip"
    CATEGORY = "image/transform"

    def flip(self, image: torch.Tensor, flip_method: str):
        return (torch.flip(image, dims=(1 if flip_method.startswith("x") else 2,)),)


class GetImageSize:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",)}, "hidden": {"unique_id": "UNIQUE_ID"}}

    RETURN_TYPES = ("INT", "INT", "INT")
    RETURN_NAMES = ("width", "height", "batch_size")
    FUNCTION = "get_size"
    CATEGORY = "image"
    DESCRIPTION = "Returns width and height of the image, and passes it through unchanged."

    def get_size(self, image: torch.Tensor, unique_id: str | None = None):
        from server import PromptServer

        batch, height, width = image.shape[:3]
        if unique_id:
            text = f"width: {width}, height: {height}\n batch size: {batch}"
            PromptServer.instance.send_progress_text(text, unique_id)
        return (width, height, batch)


class ImageScaleToMaxDimension:
    upscale_methods = ["area", "lanczos", "bilinear", "nearest-exact", "bilinear", "bicubic"]

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "image": ("IMAGE",),
                "upscale_method": (cls.upscale_methods,),
                "largest_size": pixels(512, 0, 1),
            }
        }

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "upscale"
    CATEGORY = "image/upscaling"

    def upscale(self, image: torch.Tensor, upscale_method: str, largest_size: int):
        factor = largest_size / max(image.shape[1:3])
        height, width = (round(side * factor) for side in image.shape[1:3])
        return (scaled(image, width, height, upscale_method, "disabled"),)


def _centred(image: torch.Tensor, height: int, width: int, value: float) -> torch.Tensor:
    """The image in the middle of a larger plain one."""
    down, right = height - image.shape[1], width - image.shape[2]
    borders = (0, 0, right // 2, right - right // 2, down // 2, down - down // 2)
    return torch.nn.functional.pad(image, borders, value=value)


class ResizeAndPadImage:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "image": ("IMAGE",),
                "target_width": pixels(512, 1, 1),
                "target_height": pixels(512, 1, 1),
                "padding_color": (["white", "black"],),
                "interpolation": (["area", "bicubic", "nearest-exact", "bilinear", "lanczos"],),
            }
        }

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "resize_and_pad"
    CATEGORY = "image/transform"

    def resize_and_pad(
        self, image: torch.Tensor, target_width: int, target_height: int, padding_color: str, interpolation: str
    ):
        rows, columns = image.shape[1:3]
        factor = min(target_width / columns, target_height / rows)
        resized = scaled(image, int(columns * factor), int(rows * factor), interpolation, "disabled")
        return (_centred(resized, target_height, target_width, 0.0 if padding_color == "black" else 1.0),)


COLOURS = {"white": (1, 1, 1), "black": (0, 0, 0), "red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}


class ImageStitch:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "image1": ("IMAGE",),
                "direction": (["right", "down", "left", "up"], {"default": "right"}),
                "match_image_size": ("BOOLEAN", {"default": True}),
                "spacing_width": whole(0, 0, 1024, 2),
                "spacing_color": (list(COLOURS), {"default": "white"}),
            },
            "optional": {"image2": ("IMAGE",)},
        }

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "stitch"
    CATEGORY = "image/transform"
    DESCRIPTION = "Puts image2 beside image1, on the side you choose. Without image2, image1 is returned unchanged."

    def stitch(
        self,
        image1: torch.Tensor,
        direction: str,
        match_image_size: bool,
        spacing_width: int,
        spacing_color: str,
        image2: torch.Tensor | None = None,
    ):
        """The second picture gets the first one's length along the seam; otherwise the shorter is padded with black."""
        if image2 is None:
            return (image1,)
        side_by_side = direction in ("left", "right")
        count = max(image1.shape[0], image2.shape[0])
        parts = [torch.cat([image, image[-1:].repeat(count - image.shape[0], 1, 1, 1)]) for image in (image1, image2)]
        rows, columns = parts[0].shape[1:3]
        if match_image_size:
            ratio = parts[1].shape[2] / parts[1].shape[1]
            size = (int(rows * ratio), rows) if side_by_side else (columns, int(columns / ratio))
            parts[1] = scaled(parts[1], *size, "lanczos", "disabled")
        else:
            seam = 1 if side_by_side else 2
            longest = max(part.shape[seam] for part in parts)
            parts = [
                _centred(part, longest if seam == 1 else part.shape[1], longest if seam == 2 else part.shape[2], 0.0)
                for part in parts
            ]
        channels = max(part.shape[-1] for part in parts)
        parts = [torch.nn.functional.pad(part, (0, channels - part.shape[-1]), value=1.0) for part in parts]
        if direction in ("left", "up"):
            parts.reverse()
        if spacing_width > 0:
            parts.insert(1, self._spacing(parts[0], side_by_side, spacing_width, spacing_color))
        return (torch.cat(parts, dim=2 if side_by_side else 1),)

    @staticmethod
    def _spacing(beside: torch.Tensor, side_by_side: bool, width: int, colour: str) -> torch.Tensor:
        width += width % 2
        batch, rows, columns, channels = beside.shape
        values = torch.tensor([*COLOURS[colour], 1][:channels], dtype=beside.dtype, device=beside.device)
        shape = (batch, rows, width, channels) if side_by_side else (batch, width, columns, channels)
        return values.expand(shape)


class _SaveAnimated:
    RETURN_TYPES = ()
    FUNCTION = "save_images"
    OUTPUT_NODE = True
    CATEGORY = "image/animation"

    def __init__(self) -> None:
        self.output_dir = folder_paths.get_output_directory()
        self.type = "output"
        self.prefix_append = ""

    @staticmethod
    def _holder(prompt: Any, extra_pnginfo: Any) -> Any:
        return SimpleNamespace(hidden=SimpleNamespace(prompt=prompt, extra_pnginfo=extra_pnginfo))


class SaveAnimatedWEBP(_SaveAnimated):
    methods = {"default": 4, "fastest": 0, "slowest": 6}

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "images": ("IMAGE",),
                "filename_prefix": ("STRING", {"default": "ComfyUI"}),
                "fps": number(6.0, 0.01, 1000.0, 0.01),
                "lossless": ("BOOLEAN", {"default": True}),
                "quality": whole(80, 0, 100),
                "method": (list(cls.methods),),
            },
            "hidden": PNG_INFO,
        }

    def save_images(
        self,
        images: torch.Tensor,
        fps: float,
        filename_prefix: str,
        lossless: bool,
        quality: int,
        method: str,
        num_frames: int = 0,
        prompt: Any = None,
        extra_pnginfo: Any = None,
    ):
        """`num_frames` pictures to a file; 0: all."""
        count = num_frames or len(images)
        results = [
            ImageSaveHelper.save_animated_webp(
                images[start : start + count],
                filename_prefix,
                FolderType.output,
                self._holder(prompt, extra_pnginfo),
                fps,
                lossless,
                quality,
                self.methods.get(method, 4),
            )
            for start in range(0, len(images), count)
        ]
        return {"ui": {"images": results, "animated": (count != 1,)}}


class SaveAnimatedPNG(_SaveAnimated):
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "images": ("IMAGE",),
                "filename_prefix": ("STRING", {"default": "ComfyUI"}),
                "fps": number(6.0, 0.01, 1000.0, 0.01),
                "compress_level": whole(4, 0, 9),
            },
            "hidden": PNG_INFO,
        }

    def save_images(
        self,
        images: torch.Tensor,
        fps: float,
        compress_level: int,
        filename_prefix: str = "ComfyUI",
        prompt: Any = None,
        extra_pnginfo: Any = None,
    ):
        result = ImageSaveHelper.save_animated_png(
            images, filename_prefix, FolderType.output, self._holder(prompt, extra_pnginfo), fps, compress_level
        )
        return {"ui": {"images": [result], "animated": (True,)}}


class SVG:
    """Vector pictures: `data` is a list of BytesIO with SVG texts."""

    def __init__(self, data: list[io.BytesIO]) -> None:
        self.data = data

    def combine(self, other: SVG) -> SVG:
        return SVG(self.data + other.data)

    @staticmethod
    def combine_all(svgs: list[SVG]) -> SVG:
        return SVG([item for svg in svgs for item in svg.data])


class SaveSVGNode:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"svg": ("SVG",), "filename_prefix": ("STRING", {"default": "svg/ComfyUI"})},
            "hidden": PNG_INFO,
        }

    RETURN_TYPES = ()
    FUNCTION = "save_svg"
    OUTPUT_NODE = True
    CATEGORY = "image/save"
    DESCRIPTION = "Save SVG files on disk."

    def save_svg(self, svg: SVG, filename_prefix: str = "svg/ComfyUI", prompt: Any = None, extra_pnginfo: Any = None):
        """Prompt and workflow go into a metadata element at the beginning of the picture."""
        root = folder_paths.get_output_directory()
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(filename_prefix, root)
        texts = metadata_texts(prompt, extra_pnginfo)
        note = f"<metadata><![CDATA[{json.dumps(texts)}]]></metadata>" if texts else ""
        results = []
        for position, picture in enumerate(svg.data):
            text = picture.getvalue().decode("utf-8")
            text = re.sub(r"<svg[^>]*>", lambda start: f"{start.group(0)}{note}", text, count=1)
            file = f"{name.replace('%batch_num%', str(position))}_{counter + position:05}_.svg"
            with open(os.path.join(folder, file), "w", encoding="utf-8") as stream:
                stream.write(text)
            results.append({"filename": file, "subfolder": subfolder, "type": "output"})
        return {"ui": {"images": results}}


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls
    for cls in (
        ImageCrop,
        RepeatImageBatch,
        ImageFromBatch,
        ImageAddNoise,
        SaveAnimatedWEBP,
        SaveAnimatedPNG,
        SaveSVGNode,
        ImageStitch,
        ResizeAndPadImage,
        GetImageSize,
        ImageRotate,
        ImageFlip,
        ImageScaleToMaxDimension,
    )
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "ImageCrop": "Image Crop",
    "ImageStitch": "Image Stitch",
    "GetImageSize": "Get Image Size",
}
