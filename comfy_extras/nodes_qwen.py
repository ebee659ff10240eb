"""Prompts for Qwen-Image-Edit: the text encoder sees the pictures, the model gets them as reference latents."""

from __future__ import annotations

import math
from typing import Any

import torch

import node_helpers
from comfy.text_encoders.qwen_image import EDIT_TEMPLATE, PICTURE_WORDS
from comfy_api.latest import io
from comfy_nodes.conditioning import need_clip
from comfy_nodes.image import scaled
from comfy_nodes.v3 import extension, prompt

MEGAPIXEL = 1024 * 1024
SEEN_PIXELS = 384 * 384


def resized(image: torch.Tensor, total: int, multiple: int = 1) -> torch.Tensor:
    """The picture with about `total` pixels and sides that are multiples of `multiple`, without alpha."""
    factor = math.sqrt(total / (image.shape[1] * image.shape[2]))
    height, width = (round(side * factor / multiple) * multiple for side in image.shape[1:3])
    return scaled(image, width, height, "area", "disabled")[..., :3]


def with_references(conditioning: Any, latents: list[torch.Tensor]) -> Any:
    if not latents:
        return conditioning
    return node_helpers.conditioning_set_values(conditioning, {"reference_latents": latents}, append=True)


class TextEncodeQwenImageEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TextEncodeQwenImageEdit",
            category="advanced/conditioning",
            inputs=[
                io.Clip.Input("clip"),
                prompt("prompt"),
                io.Vae.Input("vae", optional=True),
                io.Image.Input("image", optional=True),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, clip: Any, prompt: str, vae: Any = None, image: torch.Tensor | None = None):
        need_clip(clip)
        images = [] if image is None else [resized(image, MEGAPIXEL)]
        latents = [vae.encode(picture) for picture in images] if vae is not None else []
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(prompt, images=images))
        return io.NodeOutput(with_references(conditioning, latents))

    encode = execute


class TextEncodeQwenImageEditPlus(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        pictures = [io.Image.Input(f"image{number}", optional=True) for number in (1, 2, 3)]
        return io.Schema(
            node_id="TextEncodeQwenImageEditPlus",
            category="advanced/conditioning",
            inputs=[io.Clip.Input("clip"), prompt("prompt"), io.Vae.Input("vae", optional=True), *pictures],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(
        cls,
        clip: Any,
        prompt: str,
        vae: Any = None,
        image1: torch.Tensor | None = None,
        image2: torch.Tensor | None = None,
        image3: torch.Tensor | None = None,
    ):
        """Pictures are called "Picture 1" and so on, by the input they are in."""
        need_clip(clip)
        seen, latents, names = [], [], ""
        for number, image in enumerate((image1, image2, image3), start=1):
            if image is None:
                continue
            seen.append(resized(image, SEEN_PIXELS))
            names += f"Picture {number}: {PICTURE_WORDS}"
            if vae is not None:
                latents.append(vae.encode(resized(image, MEGAPIXEL, multiple=8)))
        tokens = clip.tokenize(names + prompt, images=seen, llama_template=EDIT_TEMPLATE)
        return io.NodeOutput(with_references(clip.encode_from_tokens_scheduled(tokens), latents))

    encode = execute


comfy_entrypoint = extension(TextEncodeQwenImageEdit, TextEncodeQwenImageEditPlus)
