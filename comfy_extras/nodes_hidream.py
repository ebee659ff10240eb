"""Text encoders of HiDream."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from comfy_nodes.conditioning import need_clip
from comfy_nodes.loaders import files, load_text_encoders
from comfy_nodes.model_files import watches_files
from comfy_nodes.v3 import extension, prompt


@watches_files(**{f"clip_name{number}": "text_encoders" for number in range(1, 5)})
class QuadrupleCLIPLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = [f"clip_name{number}" for number in range(1, 5)]
        return io.Schema(
            node_id="QuadrupleCLIPLoader",
            category="advanced/loaders",
            description="Loads four text encoder files: for hidream clip-l, clip-g, t5 and llama 3.1 8b instruct.",
            inputs=[io.Combo.Input(name, options=files("text_encoders")) for name in names],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, clip_name1: str, clip_name2: str, clip_name3: str, clip_name4: str):
        return io.NodeOutput(*load_text_encoders([clip_name1, clip_name2, clip_name3, clip_name4], "hidream"))

    load_clip = execute


class CLIPTextEncodeHiDream(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CLIPTextEncodeHiDream",
            category="advanced/conditioning",
            inputs=[
                io.Clip.Input("clip"),
                prompt("clip_l"),
                prompt("clip_g"),
                prompt("t5xxl"),
                prompt("llama"),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, clip: Any, clip_l: str, clip_g: str, t5xxl: str, llama: str):
        need_clip(clip)
        tokens = clip.tokenize(clip_g)
        for encoder, text in (("l", clip_l), ("t5xxl", t5xxl), ("llama", llama)):
            tokens[encoder] = clip.tokenize(text)[encoder]
        return io.NodeOutput(clip.encode_from_tokens_scheduled(tokens))

    encode = execute


comfy_entrypoint = extension(QuadrupleCLIPLoader, CLIPTextEncodeHiDream)
