"""Guidance that leans on the positive prompt where both prompts agree."""

from __future__ import annotations

from typing import Any

import torch

from comfy_api.latest import io
from comfy_nodes.v3 import extension


def _signed_root(x: torch.Tensor) -> torch.Tensor:
    return x.abs().sqrt() * x.sign()


def leaning(arguments: dict[str, Any]) -> torch.Tensor:
    """A blend of guidance and the scaled positive prediction; the more alike their middle is to the negative one,
    the more of guidance."""
    scale, guided = arguments["cond_scale"], arguments["denoised"]
    leap = arguments["cond_denoised"] * scale
    alike = torch.nn.functional.cosine_similarity(
        _signed_root(arguments["uncond_denoised"] * scale), _signed_root((leap + guided) / 2)
    ).mean()
    share = (alike + 1) / 2
    return share * guided + (1 - share) * leap


class Mahiro(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Mahiro",
            category="_for_testing",
            is_experimental=True,
            display_name="Mahiro is so cute that she deserves a better guidance function!! (。・ω・。)",
            description="Guidance by the direction of the positive prompt more than by the difference of both.",
            inputs=[io.Model.Input("model")],
            outputs=[io.Model.Output(display_name="patched_model")],
        )

    @classmethod
    def execute(cls, model: Any):
        model = model.clone()
        model.set_model_sampler_post_cfg_function(leaning)
        return io.NodeOutput(model)


comfy_entrypoint = extension(Mahiro)
