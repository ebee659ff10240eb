"""Prompts for HunyuanDiT, a text for each of its encoders."""

from __future__ import annotations

from typing import Any

from comfy.missing import missing_names
from comfy_nodes.conditioning import need_clip

_TEXT = ("STRING", {"multiline": True, "dynamicPrompts": True})


class CLIPTextEncodeHunyuanDiT:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"clip": ("CLIP",), "bert": _TEXT, "mt5xl": _TEXT}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"
    CATEGORY = "advanced/conditioning"

    def encode(self, clip: Any, bert: str, mt5xl: str):
        """BERT reads one text, mT5 the other."""
        need_clip(clip)
        tokens = {**clip.tokenize(bert), "mt5xl": clip.tokenize(mt5xl)["mt5xl"]}
        return (clip.encode_from_tokens_scheduled(tokens),)


NODE_CLASS_MAPPINGS = {"CLIPTextEncodeHunyuanDiT": CLIPTextEncodeHunyuanDiT}

__getattr__ = missing_names(__name__, {"LatentUpscaleModelLoader": "HunyuanVideo"})
