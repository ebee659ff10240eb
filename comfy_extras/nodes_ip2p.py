"""Conditioning for models that edit a picture given as extra channels."""

from __future__ import annotations

from typing import Any

import torch

import node_helpers
from comfy_api.latest import io
from comfy_nodes.v3 import extension

PROMPTS = ("positive", "negative")
CELL = 8


def middle(pixels: torch.Tensor) -> torch.Tensor:
    """The middle of pictures [B, H, W, C], cut to multiples of 8."""
    rows, columns = pixels.shape[1:3]
    top, left = rows % CELL // 2, columns % CELL // 2
    return pixels[:, top : top + rows // CELL * CELL, left : left + columns // CELL * CELL]


class InstructPixToPixConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        given = [io.Conditioning.Input(name) for name in PROMPTS]
        made = [io.Conditioning.Output(display_name=name) for name in PROMPTS]
        return io.Schema(
            node_id=cls.__name__,
            category="conditioning/instructpix2pix",
            inputs=[*given, io.Vae.Input("vae"), io.Image.Input("pixels")],
            outputs=[*made, io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(cls, pixels: torch.Tensor, vae: Any, **prompts: Any):
        """The picture goes into both conditionings; sampling starts from an empty latent of its size."""
        latent = vae.encode(middle(pixels))
        image = {"concat_latent_image": latent}
        changed = (node_helpers.conditioning_set_values(prompts[name], image) for name in PROMPTS)
        return io.NodeOutput(*changed, {"samples": torch.zeros_like(latent)})


comfy_entrypoint = extension(InstructPixToPixConditioning)
