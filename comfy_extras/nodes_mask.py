"""Nodes on masks: [B, H, W] in 0..1."""

from __future__ import annotations

from typing import Any

import torch

import comfy.utils
import node_helpers
import nodes
from comfy_nodes.fields import number, pixels, whole


def composite(
    destination: torch.Tensor,
    source: torch.Tensor,
    x: int,
    y: int,
    mask: torch.Tensor | None = None,
    multiplier: int = 8,
    resize_source: bool = False,
) -> torch.Tensor:
    """`destination` [B, C, H, W] with `source` pasted at (x, y), given in pixels of which a cell has `multiplier`.

    Where `mask` is 1 the source shows; it may lie partly or wholly outside. Changes `destination` and returns it.
    """
    rows, columns = destination.shape[-2:]
    source = source.to(destination.device)
    if resize_source:
        source = torch.nn.functional.interpolate(source, size=(rows, columns), mode="bilinear")
    source = comfy.utils.repeat_to_batch_size(source, destination.shape[0])
    height, width = source.shape[-2:]
    left = max(-width * multiplier, min(x, columns * multiplier)) // multiplier
    top = max(-height * multiplier, min(y, rows * multiplier)) // multiplier
    if mask is None:
        weight = torch.ones_like(source)
    else:
        flat = mask.to(destination.device, copy=True).reshape((-1, 1, mask.shape[-2], mask.shape[-1]))
        weight = torch.nn.functional.interpolate(flat, size=(height, width), mode="bilinear")
        weight = comfy.utils.repeat_to_batch_size(weight, source.shape[0])
    shown = (slice(max(-top, 0), min(height, rows - top)), slice(max(-left, 0), min(width, columns - left)))
    place = (slice(max(top, 0), top + shown[0].stop), slice(max(left, 0), left + shown[1].stop))
    if shown[0].stop > shown[0].start and shown[1].stop > shown[1].start:
        weight = weight[..., shown[0], shown[1]]
        under = destination[..., place[0], place[1]]
        destination[..., place[0], place[1]] = source[..., shown[0], shown[1]] * weight + under * (1.0 - weight)
    return destination


class LatentCompositeMasked:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "destination": ("LATENT",),
                "source": ("LATENT",),
                "x": pixels(0),
                "y": pixels(0),
                "resize_source": ("BOOLEAN", {"default": False}),
            },
            "optional": {"mask": ("MASK",)},
        }

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "composite"
    CATEGORY = "latent"

    def composite(
        self,
        destination: dict[str, Any],
        source: dict[str, Any],
        x: int,
        y: int,
        resize_source: bool,
        mask: torch.Tensor | None = None,
    ):
        under = destination["samples"].clone()
        return ({**destination, "samples": composite(under, source["samples"], x, y, mask, 8, resize_source)},)


class ImageCompositeMasked:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "destination": ("IMAGE",),
                "source": ("IMAGE",),
                "x": pixels(0, 0, 1),
                "y": pixels(0, 0, 1),
                "resize_source": ("BOOLEAN", {"default": False}),
            },
            "optional": {"mask": ("MASK",)},
        }

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "composite"
    CATEGORY = "image"

    def composite(
        self,
        destination: torch.Tensor,
        source: torch.Tensor,
        x: int,
        y: int,
        resize_source: bool,
        mask: torch.Tensor | None = None,
    ):
        destination, source = node_helpers.image_alpha_fix(destination, source)
        under = destination.clone().movedim(-1, 1)
        return (composite(under, source.movedim(-1, 1), x, y, mask, 1, resize_source).movedim(1, -1),)


class MaskToImage:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"mask": ("MASK",)}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "mask_to_image"
    CATEGORY = "mask"

    def mask_to_image(self, mask: torch.Tensor):
        return (mask.reshape((-1, mask.shape[-2], mask.shape[-1], 1)).expand(-1, -1, -1, 3),)


class ImageToMask:
    _CHANNELS = ["red", "green", "blue", "alpha"]

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "channel": (cls._CHANNELS,)}}

    RETURN_TYPES = ("MASK",)
    FUNCTION = "image_to_mask"
    CATEGORY = "mask"

    def image_to_mask(self, image: torch.Tensor, channel: str):
        index = self._CHANNELS.index(channel)
        if index >= image.shape[-1]:
            raise ValueError(f"the image has {image.shape[-1]} channels, so there is no {channel}; choose another one")
        return (image[..., index],)


class ImageColorToMask:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "color": whole(0, 0, 0xFFFFFF, 1, display="color")}}

    RETURN_TYPES = ("MASK",)
    FUNCTION = "image_to_mask"
    CATEGORY = "mask"

    def image_to_mask(self, image: torch.Tensor, color: int):
        """1 where the picture, in 8 bits, has exactly this colour 0xRRGGBB."""
        levels = (image[..., :3].clamp(0, 1) * 255.0).round().to(torch.int)
        wanted = torch.tensor([color >> 16 & 0xFF, color >> 8 & 0xFF, color & 0xFF], device=image.device)
        return ((levels == wanted).all(dim=-1).float(),)


class SolidMask:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"value": number(1.0, 0.0, 1.0, 0.01), "width": pixels(512, 1, 1), "height": pixels(512, 1, 1)}
        }

    RETURN_TYPES = ("MASK",)
    FUNCTION = "solid"
    CATEGORY = "mask"

    def solid(self, value: float, width: int, height: int):
        return (torch.full((1, height, width), value, dtype=torch.float32, device="cpu"),)


class InvertMask:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"mask": ("MASK",)}}

    RETURN_TYPES = ("MASK",)
    FUNCTION = "invert"
    CATEGORY = "mask"

    def invert(self, mask: torch.Tensor):
        return (1.0 - mask,)


class CropMask:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "mask": ("MASK",),
                "x": pixels(0, 0, 1),
                "y": pixels(0, 0, 1),
                "width": pixels(512, 1, 1),
                "height": pixels(512, 1, 1),
            }
        }

    RETURN_TYPES = ("MASK",)
    FUNCTION = "crop"
    CATEGORY = "mask"

    def crop(self, mask: torch.Tensor, x: int, y: int, width: int, height: int):
        return (mask.reshape((-1, *mask.shape[-2:]))[:, y : y + height, x : x + width],)


_OPERATIONS = {
    "multiply": lambda below, above: below * above,
    "add": lambda below, above: below + above,
    "subtract": lambda below, above: below - above,
    "and": lambda below, above: (below.round().bool() & above.round().bool()).float(),
    "or": lambda below, above: (below.round().bool() | above.round().bool()).float(),
    "xor": lambda below, above: (below.round().bool() ^ above.round().bool()).float(),
}


class MaskComposite:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "destination": ("MASK",),
                "source": ("MASK",),
                "x": pixels(0, 0, 1),
                "y": pixels(0, 0, 1),
                "operation": (list(_OPERATIONS),),
            }
        }

    RETURN_TYPES = ("MASK",)
    FUNCTION = "combine"
    CATEGORY = "mask"

    def combine(self, destination: torch.Tensor, source: torch.Tensor, x: int, y: int, operation: str):
        result = destination.reshape((-1, *destination.shape[-2:])).clone()
        source = source.reshape((-1, *source.shape[-2:]))
        rows = min(source.shape[-2], max(result.shape[-2] - y, 0))
        columns = min(source.shape[-1], max(result.shape[-1] - x, 0))
        region = result[:, y : y + rows, x : x + columns]
        result[:, y : y + rows, x : x + columns] = _OPERATIONS[operation](region, source[:, :rows, :columns])
        return (result.clamp(0.0, 1.0),)


class FeatherMask:
    @classmethod
    def INPUT_TYPES(cls):
        sides = {side: pixels(0, 0, 1) for side in ("left", "top", "right", "bottom")}
        return {"required": {"mask": ("MASK",), **sides}}

    RETURN_TYPES = ("MASK",)
    FUNCTION = "feather"
    CATEGORY = "mask"

    def feather(self, mask: torch.Tensor, left: int, top: int, right: int, bottom: int):
        """The mask rising from its borders over so many pixels."""
        result = mask.reshape((-1, *mask.shape[-2:])).clone()
        for axis, start, end in ((-1, left, right), (-2, top, bottom)):
            size = result.shape[axis]
            weights = torch.ones(size, device=result.device)
            start, end = min(start, size), min(end, size)
            for i in range(start):
                weights[i] *= (i + 1.0) / start
            # ComfyUI counts cells from the far end as 0, -1, -2, ...: the first weight falls on the near border
            for i in range(end):
                weights[-i] *= (i + 1.0) / end
            result *= weights if axis == -1 else weights[:, None]
        return (result,)


class GrowMask:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "mask": ("MASK",),
                "expand": whole(0, -16384, 16384, 1),
                "tapered_corners": ("BOOLEAN", {"default": True}),
            }
        }

    RETURN_TYPES = ("MASK",)
    FUNCTION = "expand_mask"
    CATEGORY = "mask"

    def expand_mask(self, mask: torch.Tensor, expand: int, tapered_corners: bool):
        """Grown by `expand` pixels (negative: shrunk), as a diamond or, with square corners, as a square.

        A step takes the largest (smallest) value of a pixel and its neighbours; the border repeats.
        """
        grown = mask.reshape((-1, 1, *mask.shape[-2:]))
        sign = 1.0 if expand > 0 else -1.0
        grown = grown * sign
        for _ in range(abs(expand)):
            across = torch.nn.functional.max_pool2d(grown, (1, 3), stride=1, padding=(0, 1))
            if tapered_corners:
                down = torch.nn.functional.max_pool2d(grown, (3, 1), stride=1, padding=(1, 0))
                grown = torch.maximum(across, down)
            else:
                grown = torch.nn.functional.max_pool2d(across, (3, 1), stride=1, padding=(1, 0))
        return ((grown * sign).squeeze(1),)


class ThresholdMask:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"mask": ("MASK",), "value": number(0.5, 0.0, 1.0, 0.01)}}

    RETURN_TYPES = ("MASK",)
    FUNCTION = "image_to_mask"
    CATEGORY = "mask"

    def image_to_mask(self, mask: torch.Tensor, value: float):
        return ((mask > value).float(),)


class MaskPreview(nodes.PreviewImage):
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"mask": ("MASK",)},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    FUNCTION = "execute"
    CATEGORY = "mask"

    def execute(
        self, mask: torch.Tensor, filename_prefix: str = "ComfyUI", prompt: Any = None, extra_pnginfo: Any = None
    ):
        return self.save_images(MaskToImage().mask_to_image(mask)[0], filename_prefix, prompt, extra_pnginfo)


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls
    for cls in (
        LatentCompositeMasked,
        ImageCompositeMasked,
        MaskToImage,
        ImageToMask,
        ImageColorToMask,
        SolidMask,
        InvertMask,
        CropMask,
        MaskComposite,
        FeatherMask,
        GrowMask,
        ThresholdMask,
        MaskPreview,
    )
}
NODE_DISPLAY_NAME_MAPPINGS = {"ImageToMask": "Convert Image to Mask", "MaskToImage": "Convert Mask to Image"}
