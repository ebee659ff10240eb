"""Corrections of classifier-free guidance."""

from __future__ import annotations

from typing import Any

import torch

from comfy_api.latest import io
from comfy_nodes.v3 import extension, share

GUIDANCE = "advanced/guidance"


def projection(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """How much of `negative` there is in `positive`, per sample [B, 1, ...] (CFG-Zero*, arXiv 2503.18886)."""
    first, second = positive.flatten(1), negative.flatten(1)
    share = (first * second).sum(1, keepdim=True) / ((second**2).sum(1, keepdim=True) + 1e-8)
    return share.view(-1, *[1] * (positive.ndim - 1))


class CFGZeroStar(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CFGZeroStar",
            category=GUIDANCE,
            inputs=[io.Model.Input("model")],
            outputs=[io.Model.Output(display_name="patched_model")],
        )

    @classmethod
    def execute(cls, model: Any):
        def rescale(arguments: dict[str, Any]) -> torch.Tensor:
            x, negative = arguments["input"], arguments["uncond_denoised"]
            alpha = projection(x - arguments["cond_denoised"], x - negative)
            return arguments["denoised"] + negative * (alpha - 1.0) * (1.0 - arguments["cond_scale"])

        model = model.clone()
        model.set_model_sampler_post_cfg_function(rescale)
        return io.NodeOutput(model)

    patch = execute


class CFGNorm(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CFGNorm",
            category=GUIDANCE,
            is_experimental=True,
            inputs=[io.Model.Input("model"), share("strength", 1.0, 100.0)],
            outputs=[io.Model.Output(display_name="patched_model")],
        )

    @classmethod
    def execute(cls, model: Any, strength: float):
        """Guidance may turn a cell's channel vector but not make it longer than the positive prediction's."""

        def limit(arguments: dict[str, Any]) -> torch.Tensor:
            guided = arguments["denoised"]
            allowed = torch.linalg.vector_norm(arguments["cond_denoised"], dim=1, keepdim=True)
            length = torch.linalg.vector_norm(guided, dim=1, keepdim=True)
            return guided * (allowed / (length + 1e-8)).clamp(0.0, 1.0) * strength

        model = model.clone()
        model.set_model_sampler_post_cfg_function(limit)
        return io.NodeOutput(model)

    patch = execute


comfy_entrypoint = extension(CFGNorm, CFGZeroStar)
