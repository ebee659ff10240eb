"""Scaling of the predicted noise against exposure bias (arXiv 2308.15321)."""

from __future__ import annotations

from typing import Any

import torch

from comfy_api.latest import io
from comfy_nodes.v3 import extension


class EpsilonScaling(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        factor = io.Float.Input(
            "scaling_factor", default=1.005, min=0.5, max=1.5, step=0.001, display_mode=io.NumberDisplay.number
        )
        return io.Schema(
            node_id="Epsilon Scaling",
            category="model_patches/unet",
            inputs=[io.Model.Input("model"), factor],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, scaling_factor: float):
        if scaling_factor == 0:
            raise ValueError("scaling_factor is 0, but noise is divided by it; use a value from 0.5 to 1.5")

        def scaled(arguments: dict[str, Any]) -> torch.Tensor:
            x = arguments["input"]
            return x - (x - arguments["denoised"]) / scaling_factor

        model = model.clone()
        model.set_model_sampler_post_cfg_function(scaled)
        return io.NodeOutput(model)


comfy_entrypoint = extension(EpsilonScaling)
