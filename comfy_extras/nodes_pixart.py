"""Prompts for PixArt-Alpha, with the picture's size."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from comfy_nodes.conditioning import need_clip
from comfy_nodes.v3 import extension, prompt, side


class CLIPTextEncodePixArtAlpha(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CLIPTextEncodePixArtAlpha",
            category="advanced/conditioning",
            description="Encodes text and sets the resolution conditioning for PixArt Alpha. Not for PixArt Sigma.",
            inputs=[
                side("width", 1024, 0, None),
                side("height", 1024, 0, None),
                prompt("text"),
                io.Clip.Input("clip"),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, width: int, height: int, text: str, clip: Any):
        need_clip(clip)
        fields = {"width": width, "height": height}
        return io.NodeOutput(clip.encode_from_tokens_scheduled(clip.tokenize(text), add_dict=fields))

    encode = execute


comfy_entrypoint = extension(CLIPTextEncodePixArtAlpha)
