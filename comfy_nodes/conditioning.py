"""Nodes on conditionings and text encoders.

A conditioning is a list of `[tensor [B, L, C], dict]`; the dict's fields (`pooled_output`, `guidance`, `area`, ...) reach
the model. Lists and dicts passed in are never changed.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

import node_helpers
from comfy_nodes.fields import number, pixels, prompt_text, whole

Conditioning = list[Any]
SCALE = 8


def need_clip(clip: Any) -> None:
    """Raises RuntimeError when there is no text encoder."""
    if clip is None:
        raise RuntimeError(
            "ERROR: clip input is invalid: None\n\nIf the clip is from a checkpoint loader node your checkpoint does "
            "not contain a valid clip or text encoder model; load one with CLIPLoader or DualCLIPLoader."
        )


class CLIPTextEncode:
    @classmethod
    def INPUT_TYPES(cls):
        kind, options = prompt_text()
        return {
            "required": {
                "text": (kind, {**options, "tooltip": "The text to be encoded."}),
                "clip": ("CLIP", {"tooltip": "The text encoder."}),
            }
        }

    RETURN_TYPES = ("CONDITIONING",)
    OUTPUT_TOOLTIPS = ("The text as the diffusion model understands it.",)
    FUNCTION = "encode"
    CATEGORY = "conditioning"
    DESCRIPTION = "Encodes a text prompt into what guides the diffusion model."

    def encode(self, clip: Any, text: str):
        need_clip(clip)
        return (clip.encode_from_tokens_scheduled(clip.tokenize(text)),)


class CLIPSetLastLayer:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"clip": ("CLIP",), "stop_at_clip_layer": whole(-1, -24, -1, 1)}}

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "set_last_layer"
    CATEGORY = "conditioning"

    def set_last_layer(self, clip: Any, stop_at_clip_layer: int):
        need_clip(clip)
        clip = clip.clone()
        clip.clip_layer(stop_at_clip_layer)
        return (clip,)


class ConditioningCombine:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning_1": ("CONDITIONING",), "conditioning_2": ("CONDITIONING",)}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "combine"
    CATEGORY = "conditioning"

    def combine(self, conditioning_1: Conditioning, conditioning_2: Conditioning):
        return (conditioning_1 + conditioning_2,)


def _single(conditioning_from: Conditioning, node: str) -> list[Any]:
    if len(conditioning_from) > 1:
        logging.warning("%s: conditioning_from has %d entries, only the first is used", node, len(conditioning_from))
    return conditioning_from[0]


class ConditioningAverage:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "conditioning_to": ("CONDITIONING",),
                "conditioning_from": ("CONDITIONING",),
                "conditioning_to_strength": number(1.0, 0.0, 1.0, 0.01),
            }
        }

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "addWeighted"
    CATEGORY = "conditioning"

    def addWeighted(
        self, conditioning_to: Conditioning, conditioning_from: Conditioning, conditioning_to_strength: float
    ):
        """strength * to + (1 - strength) * from, over the tokens and the pooled output; from is cut or zero-padded."""
        other, fields = _single(conditioning_from, "ConditioningAverage")
        pooled = fields.get("pooled_output")
        weight = conditioning_to_strength
        result = []
        for tensor, own_fields in conditioning_to:
            length = tensor.shape[1]
            cut = other[:, :length]
            if cut.shape[1] < length:
                cut = torch.nn.functional.pad(cut, (0, 0, 0, length - cut.shape[1]))
            own_fields = own_fields.copy()
            own_pooled = own_fields.get("pooled_output")
            if pooled is not None:
                own_fields["pooled_output"] = (
                    pooled if own_pooled is None else own_pooled * weight + pooled * (1.0 - weight)
                )
            result.append([tensor * weight + cut * (1.0 - weight), own_fields])
        return (result,)


class ConditioningConcat:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning_to": ("CONDITIONING",), "conditioning_from": ("CONDITIONING",)}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "concat"
    CATEGORY = "conditioning"

    def concat(self, conditioning_to: Conditioning, conditioning_from: Conditioning):
        other = _single(conditioning_from, "ConditioningConcat")[0]
        return ([[torch.cat((tensor, other), 1), fields.copy()] for tensor, fields in conditioning_to],)


class ConditioningSetArea:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "conditioning": ("CONDITIONING",),
                "width": pixels(64, 64),
                "height": pixels(64, 64),
                "x": pixels(0),
                "y": pixels(0),
                "strength": number(1.0, 0.0, 10.0, 0.01),
            }
        }

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "append"
    CATEGORY = "conditioning"

    def append(self, conditioning: Conditioning, width: int, height: int, x: int, y: int, strength: float):
        area = (height // SCALE, width // SCALE, y // SCALE, x // SCALE)
        values = {"area": area, "strength": strength, "set_area_to_bounds": False}
        return (node_helpers.conditioning_set_values(conditioning, values),)


class ConditioningSetAreaPercentage:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "conditioning": ("CONDITIONING",),
                "width": number(1.0, 0, 1.0, 0.01),
                "height": number(1.0, 0, 1.0, 0.01),
                "x": number(0, 0, 1.0, 0.01),
                "y": number(0, 0, 1.0, 0.01),
                "strength": number(1.0, 0.0, 10.0, 0.01),
            }
        }

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "append"
    CATEGORY = "conditioning"

    def append(self, conditioning: Conditioning, width: float, height: float, x: float, y: float, strength: float):
        values = {
            "area": ("percentage", height, width, y, x),
            "strength": strength,
            "set_area_to_bounds": False,
        }
        return (node_helpers.conditioning_set_values(conditioning, values),)


class ConditioningSetAreaStrength:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",), "strength": number(1.0, 0.0, 10.0, 0.01)}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "append"
    CATEGORY = "conditioning"

    def append(self, conditioning: Conditioning, strength: float):
        return (node_helpers.conditioning_set_values(conditioning, {"strength": strength}),)


class ConditioningSetMask:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "conditioning": ("CONDITIONING",),
                "mask": ("MASK",),
                "strength": number(1.0, 0.0, 10.0, 0.01),
                "set_cond_area": (["default", "mask bounds"],),
            }
        }

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "append"
    CATEGORY = "conditioning"

    def append(self, conditioning: Conditioning, mask: torch.Tensor, set_cond_area: str, strength: float):
        values = {
            "mask": mask.unsqueeze(0) if mask.ndim < 3 else mask,
            "set_area_to_bounds": set_cond_area != "default",
            "mask_strength": strength,
        }
        return (node_helpers.conditioning_set_values(conditioning, values),)


class ConditioningZeroOut:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",)}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "zero_out"
    CATEGORY = "advanced/conditioning"

    def zero_out(self, conditioning: Conditioning):
        result = []
        for tensor, fields in conditioning:
            fields = fields.copy()
            for key in ("pooled_output", "conditioning_lyrics"):
                if fields.get(key) is not None:
                    fields[key] = torch.zeros_like(fields[key])
            result.append([torch.zeros_like(tensor), fields])
        return (result,)


class ConditioningSetTimestepRange:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "conditioning": ("CONDITIONING",),
                "start": number(0.0, 0.0, 1.0, 0.001),
                "end": number(1.0, 0.0, 1.0, 0.001),
            }
        }

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "set_range"
    CATEGORY = "advanced/conditioning"

    def set_range(self, conditioning: Conditioning, start: float, end: float):
        values = {"start_percent": start, "end_percent": end}
        return (node_helpers.conditioning_set_values(conditioning, values),)


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls
    for cls in (
        CLIPTextEncode,
        CLIPSetLastLayer,
        ConditioningCombine,
        ConditioningAverage,
        ConditioningConcat,
        ConditioningSetArea,
        ConditioningSetAreaPercentage,
        ConditioningSetAreaStrength,
        ConditioningSetMask,
        ConditioningZeroOut,
        ConditioningSetTimestepRange,
    )
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "CLIPTextEncode": "CLIP Text Encode (Prompt)",
    "CLIPSetLastLayer": "CLIP Set Last Layer",
    "ConditioningCombine": "Conditioning (Combine)",
    "ConditioningAverage": "ConditioningAverage",
    "ConditioningConcat": "Conditioning (Concat)",
    "ConditioningSetArea": "Conditioning (Set Area)",
    "ConditioningSetAreaPercentage": "Conditioning (Set Area with Percentage)",
    "ConditioningSetMask": "Conditioning (Set Mask)",
}
