"""Nodes on latents.

A latent is a dict: `samples` [B, C, H/8, W/8] (video: [B, C, T, H/8, W/8]), optionally `noise_mask` [B, 1, H, W] and
`batch_index` (list of ints). Unknown keys are kept; the dict passed in is never changed.
"""

from __future__ import annotations

import math
from typing import Any

import torch

import comfy.model_management
import comfy.utils
from comfy_nodes.fields import MAX_RESOLUTION, batch_size, number, pixels, whole

Latent = dict[str, Any]
UPSCALE_METHODS = ["nearest-exact", "bilinear", "area", "bicubic", "bislerp"]
CROP_METHODS = ["disabled", "center"]
SCALE = 8


def replaced(latent: Latent, **values: Any) -> Latent:
    """A copy of a latent with some keys set."""
    return {**latent, **values}


def repeat_mask(mask: torch.Tensor, count: int) -> torch.Tensor:
    """A mask [b, ...] repeated in order until there are `count` of them."""
    if mask.shape[0] >= count:
        return mask
    times = math.ceil(count / mask.shape[0])
    return mask.repeat((times,) + (1,) * (mask.ndim - 1))[:count]


class EmptyLatentImage:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"width": pixels(512, 16), "height": pixels(512, 16), "batch_size": batch_size()}}

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "generate"
    CATEGORY = "latent"
    DESCRIPTION = "Create a batch of empty latents to be denoised."

    def __init__(self) -> None:
        self.device = comfy.model_management.intermediate_device()

    def generate(self, width: int, height: int, batch_size: int = 1):
        shape = (batch_size, 4, height // SCALE, width // SCALE)
        return ({"samples": torch.zeros(shape, device=self.device)},)


class LatentUpscale:
    upscale_methods = UPSCALE_METHODS
    crop_methods = CROP_METHODS

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "samples": ("LATENT",),
                "upscale_method": (cls.upscale_methods,),
                "width": pixels(),
                "height": pixels(),
                "crop": (cls.crop_methods,),
            }
        }

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "upscale"
    CATEGORY = "latent"

    def upscale(self, samples: Latent, upscale_method: str, width: int, height: int, crop: str):
        """A side of 0 follows from the other one; with both 0 nothing changes."""
        if width == 0 and height == 0:
            return (samples,)
        tensor = samples["samples"]
        rows, columns = tensor.shape[-2:]
        if width == 0:
            height = max(64, height)
            width = max(64, round(columns * height / rows))
        elif height == 0:
            width = max(64, width)
            height = max(64, round(rows * width / columns))
        width, height = max(64, width) // SCALE, max(64, height) // SCALE
        return (replaced(samples, samples=comfy.utils.common_upscale(tensor, width, height, upscale_method, crop)),)


class LatentUpscaleBy:
    upscale_methods = UPSCALE_METHODS

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "samples": ("LATENT",),
                "upscale_method": (cls.upscale_methods,),
                "scale_by": number(1.5, 0.01, 8.0, 0.01),
            }
        }

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "upscale"
    CATEGORY = "latent"

    def upscale(self, samples: Latent, upscale_method: str, scale_by: float):
        tensor = samples["samples"]
        height, width = (round(side * scale_by) for side in tensor.shape[-2:])
        scaled = comfy.utils.common_upscale(tensor, width, height, upscale_method, "disabled")
        return (replaced(samples, samples=scaled),)


class LatentFromBatch:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",), "batch_index": whole(0, 0, 63), "length": whole(1, 1, 64)}}

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "frombatch"
    CATEGORY = "latent/batch"

    def frombatch(self, samples: Latent, batch_index: int, length: int):
        tensor = samples["samples"]
        start = min(tensor.shape[0] - 1, batch_index)
        stop = start + min(tensor.shape[0] - start, length)
        changes: Latent = {"samples": tensor[start:stop].clone()}
        mask = samples.get("noise_mask")
        if mask is not None:
            part = mask if mask.shape[0] == 1 else repeat_mask(mask, tensor.shape[0])[start:stop]
            changes["noise_mask"] = part.clone()
        indices = samples.get("batch_index")
        changes["batch_index"] = list(range(start, stop)) if indices is None else indices[start:stop]
        return (replaced(samples, **changes),)


class RepeatLatentBatch:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",), "amount": whole(1, 1, 64)}}

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "repeat"
    CATEGORY = "latent/batch"

    def repeat(self, samples: Latent, amount: int):
        tensor = samples["samples"]
        changes: Latent = {"samples": tensor.repeat((amount,) + (1,) * (tensor.ndim - 1))}
        mask = samples.get("noise_mask")
        if mask is not None and mask.shape[0] > 1:
            mask = repeat_mask(mask, tensor.shape[0])
            changes["noise_mask"] = mask.repeat((amount,) + (1,) * (mask.ndim - 1))
        if "batch_index" in samples:
            indices = samples["batch_index"]
            offset = max(indices) - min(indices) + 1
            changes["batch_index"] = [index + offset * turn for turn in range(amount) for index in indices]
        return (replaced(samples, **changes),)


class SetLatentNoiseMask:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",), "mask": ("MASK",)}}

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "set_mask"
    CATEGORY = "latent/inpaint"

    def set_mask(self, samples: Latent, mask: torch.Tensor):
        return (replaced(samples, noise_mask=mask.reshape((-1, 1, mask.shape[-2], mask.shape[-1]))),)


def _ramp(length: int, feather: int, at_start: bool, at_end: bool) -> torch.Tensor:
    """Weights along one side [length]: rising over `feather` cells at the chosen ends, 1 between."""
    weights = torch.ones(length)
    for i in range(min(feather, length)):
        share = (i + 1) / feather
        if at_start:
            weights[i] *= share
        if at_end:
            weights[length - 1 - i] *= share
    return weights


class LatentComposite:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "samples_to": ("LATENT",),
                "samples_from": ("LATENT",),
                "x": pixels(0),
                "y": pixels(0),
                "feather": pixels(0),
            }
        }

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "composite"
    CATEGORY = "latent"

    def composite(
        self,
        samples_to: Latent,
        samples_from: Latent,
        x: int,
        y: int,
        composite_method: str = "normal",
        feather: int = 0,
    ):
        x, y, feather = x // SCALE, y // SCALE, feather // SCALE
        result = samples_to["samples"].clone()
        rows, columns = result.shape[-2:]
        pasted = samples_from["samples"][..., : max(rows - y, 0), : max(columns - x, 0)].to(result)
        height, width = pasted.shape[-2:]
        # edges fade only where there is something of the other picture beside them
        down = _ramp(height, feather, y != 0, y + samples_from["samples"].shape[-2] < rows)
        across = _ramp(width, feather, x != 0, x + samples_from["samples"].shape[-1] < columns)
        weight = (down[:, None] * across[None, :]).to(result)
        region = result[..., y : y + height, x : x + width]
        result[..., y : y + height, x : x + width] = pasted * weight + region * (1.0 - weight)
        return (replaced(samples_to, samples=result),)


class LatentBlend:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "samples1": ("LATENT",),
                "samples2": ("LATENT",),
                "blend_factor": number(0.5, 0, 1, 0.01),
            }
        }

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "blend"
    CATEGORY = "_for_testing"

    def blend(self, samples1: Latent, samples2: Latent, blend_factor: float, blend_mode: str = "normal"):
        if blend_mode != "normal":
            raise ValueError(f"blend_mode {blend_mode!r} is not supported; use 'normal'")
        first, second = samples1["samples"], samples2["samples"]
        if first.shape[-2:] != second.shape[-2:]:
            second = comfy.utils.common_upscale(second, first.shape[-1], first.shape[-2], "bicubic", "center")
        return (replaced(samples1, samples=first * blend_factor + second * (1 - blend_factor)),)


class LatentRotate:
    _TURNS = {"none": 0, "90 degrees": 1, "180 degrees": 2, "270 degrees": 3}

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",), "rotation": (list(cls._TURNS),)}}

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "rotate"
    CATEGORY = "latent/transform"

    def rotate(self, samples: Latent, rotation: str):
        """Clockwise."""
        turned = torch.rot90(samples["samples"], k=self._TURNS.get(rotation, 0), dims=(-1, -2))
        return (replaced(samples, samples=turned),)


class LatentFlip:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",), "flip_method": (["x-axis: vertically", "y-axis: horizontally"],)}}

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "flip"
    CATEGORY = "latent/transform"

    def flip(self, samples: Latent, flip_method: str):
        axis = -2 if flip_method.startswith("x") else -1
        return (replaced(samples, samples=torch.flip(samples["samples"], dims=(axis,))),)


class LatentCrop:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "samples": ("LATENT",),
                "width": pixels(512, 64),
                "height": pixels(512, 64),
                "x": pixels(0),
                "y": pixels(0),
            }
        }

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "crop"
    CATEGORY = "latent/transform"

    def crop(self, samples: Latent, width: int, height: int, x: int, y: int):
        """Cells [y, y + height) x [x, x + width) in pixels; at least 64 pixels stay, cut off at the border."""
        tensor = samples["samples"]
        rows, columns = tensor.shape[-2:]
        left, top = min(x // SCALE, max(columns - 8, 0)), min(y // SCALE, max(rows - 8, 0))
        part = tensor[..., top : top + height // SCALE, left : left + width // SCALE]
        return (replaced(samples, samples=part),)


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls
    for cls in (
        EmptyLatentImage,
        LatentUpscale,
        LatentUpscaleBy,
        LatentFromBatch,
        RepeatLatentBatch,
        SetLatentNoiseMask,
        LatentComposite,
        LatentBlend,
        LatentRotate,
        LatentFlip,
        LatentCrop,
    )
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "EmptyLatentImage": "Empty Latent Image",
    "LatentUpscale": "Upscale Latent",
    "LatentUpscaleBy": "Upscale Latent By",
    "LatentFromBatch": "Latent From Batch",
    "RepeatLatentBatch": "Repeat Latent Batch",
    "SetLatentNoiseMask": "Set Latent Noise Mask",
    "LatentComposite": "Latent Composite",
    "LatentBlend": "Latent Blend",
    "LatentRotate": "Rotate Latent",
    "LatentFlip": "Flip Latent",
    "LatentCrop": "Crop Latent",
}
__all__ = ["MAX_RESOLUTION", "NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
