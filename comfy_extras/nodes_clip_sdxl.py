"""Prompts for SDXL and its refiner, with the sizes they were trained with."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from comfy_extras.nodes_sd3 import pad_alike
from comfy_nodes.conditioning import need_clip
from comfy_nodes.v3 import extension, prompt, share, side


class CLIPTextEncodeSDXLRefiner(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CLIPTextEncodeSDXLRefiner",
            category="advanced/conditioning",
            inputs=[
                share("ascore", 6.0, 1000.0),
                side("width", 1024, 0, None),
                side("height", 1024, 0, None),
                prompt("text"),
                io.Clip.Input("clip"),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, ascore: float, width: int, height: int, text: str, clip: Any):
        need_clip(clip)
        fields = {"aesthetic_score": ascore, "width": width, "height": height}
        return io.NodeOutput(clip.encode_from_tokens_scheduled(clip.tokenize(text), add_dict=fields))

    encode = execute


class CLIPTextEncodeSDXL(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        sizes = [
            ("width", 1024),
            ("height", 1024),
            ("crop_w", 0),
            ("crop_h", 0),
            ("target_width", 1024),
            ("target_height", 1024),
        ]
        return io.Schema(
            node_id="CLIPTextEncodeSDXL",
            category="advanced/conditioning",
            inputs=[
                io.Clip.Input("clip"),
                *(side(name, default, 0, None) for name, default in sizes),
                prompt("text_g"),
                prompt("text_l"),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(
        cls,
        clip: Any,
        width: int,
        height: int,
        crop_w: int,
        crop_h: int,
        target_width: int,
        target_height: int,
        text_g: str,
        text_l: str,
    ):
        need_clip(clip)
        tokens = {**clip.tokenize(text_g), "l": clip.tokenize(text_l)["l"]}
        pad_alike(tokens, clip.tokenize(""))
        fields = {
            "width": width,
            "height": height,
            "crop_w": crop_w,
            "crop_h": crop_h,
            "target_width": target_width,
            "target_height": target_height,
        }
        return io.NodeOutput(clip.encode_from_tokens_scheduled(tokens, add_dict=fields))

    encode = execute


comfy_entrypoint = extension(CLIPTextEncodeSDXLRefiner, CLIPTextEncodeSDXL)
