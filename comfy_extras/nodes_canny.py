"""Edges of a picture (Canny)."""

from __future__ import annotations

import torch

import comfy.model_management
from comfy_api.latest import io
from comfy_nodes.v3 import extension, share


class Canny(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Canny",
            category="image/preprocessors",
            inputs=[
                io.Image.Input("image"),
                share("low_threshold", 0.4, 0.99, 0.01),
                share("high_threshold", 0.8, 0.99, 0.01),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, low_threshold: float, high_threshold: float):
        """White edges on black, of pictures [B, H, W, 3]."""
        from kornia.filters import canny

        if low_threshold > high_threshold:
            raise ValueError(
                f"low_threshold {low_threshold} is above high_threshold {high_threshold}; make it the smaller one"
            )
        pixels = image[..., :3].to(comfy.model_management.get_torch_device()).movedim(-1, 1)
        _, edges = canny(pixels, low_threshold, high_threshold)
        pictures = edges.movedim(1, -1).expand(-1, -1, -1, 3)
        return io.NodeOutput(pictures.to(comfy.model_management.intermediate_device()))

    detect_edge = execute


comfy_entrypoint = extension(Canny)
