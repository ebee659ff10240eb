"""Less common ways to set conditioning."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from comfy_nodes.conditioning import need_clip
from comfy_nodes.v3 import extension, prompt

T5_ENCODERS = ("t5xxl", "pile_t5xl", "t5base", "mt5xl", "umt5xxl")


class CLIPTextEncodeControlnet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CLIPTextEncodeControlnet",
            category="_for_testing/conditioning",
            is_experimental=True,
            inputs=[io.Clip.Input("clip"), io.Conditioning.Input("conditioning"), prompt("text")],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, clip: Any, conditioning: Any, text: str):
        """A text for the control network alone."""
        need_clip(clip)
        encoded, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
        added = {"cross_attn_controlnet": encoded, "pooled_output_controlnet": pooled}
        return io.NodeOutput([[tensor, {**fields, **added}] for tensor, fields in conditioning])

    encode = execute


class T5TokenizerOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        lengths = [io.Int.Input(name, default=0, min=0, max=10000, step=1) for name in ("min_padding", "min_length")]
        return io.Schema(
            node_id="T5TokenizerOptions",
            category="_for_testing/conditioning",
            is_experimental=True,
            inputs=[io.Clip.Input("clip"), *lengths],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, clip: Any, min_padding: int, min_length: int):
        need_clip(clip)
        clip = clip.clone()
        for encoder in T5_ENCODERS:
            clip.set_tokenizer_option(f"{encoder}_min_padding", min_padding)
            clip.set_tokenizer_option(f"{encoder}_min_length", min_length)
        return io.NodeOutput(clip)

    set_options = execute


comfy_entrypoint = extension(CLIPTextEncodeControlnet, T5TokenizerOptions)
