"""Guidance away from what a UNet predicts without self-attention in its middle (Ahn et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch

import comfy.model_patcher
import comfy.samplers
from comfy_api.latest import io
from comfy_nodes.v3 import extension, share


def values_only(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Self-attention with the identity as its attention map."""
    return v


values_only.rows_independent = True  # type: ignore[attr-defined]


class PerturbedAttentionGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PerturbedAttentionGuidance",
            category="model_patches/unet",
            inputs=[io.Model.Input("model"), share("scale", 3.0, 100.0, round=0.01)],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, scale: float):
        def guide(arguments: dict[str, Any]) -> torch.Tensor:
            if scale == 0:
                return arguments["denoised"]
            options = comfy.model_patcher.set_model_options_patch_replace(
                arguments["model_options"].copy(), values_only, "attn1", "middle", 0
            )
            (weak,) = comfy.samplers.calc_cond_batch(
                arguments["model"], [arguments["cond"]], arguments["input"], arguments["sigma"], options
            )
            return arguments["denoised"] + (arguments["cond_denoised"] - weak) * scale

        model = model.clone()
        model.set_model_sampler_post_cfg_function(guide)
        return io.NodeOutput(model)

    patch = execute


comfy_entrypoint = extension(PerturbedAttentionGuidance)
