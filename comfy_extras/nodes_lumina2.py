"""Guidance whose length is bounded by that of the positive prediction."""

from __future__ import annotations

from typing import Any

import torch

from comfy_api.latest import io
from comfy_nodes.v3 import extension, share


def _length(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)


class RenormCFG(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RenormCFG",
            category="advanced/model",
            inputs=[io.Model.Input("model"), share("cfg_trunc", 100, 100.0), share("renorm_cfg", 1.0, 100.0)],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, cfg_trunc: float, renorm_cfg: float):
        """Guidance only at sigmas below `cfg_trunc`, at most `renorm_cfg` times as long as the positive prediction."""
        channels = model.model.diffusion_model.in_channels

        def guide(arguments: dict[str, Any]) -> torch.Tensor:
            positive, negative = arguments["cond_denoised"], arguments["uncond_denoised"]
            own, rest = positive[:, :channels], positive[:, channels:]
            if arguments["timestep"][0] < cfg_trunc:
                guided = torch.lerp(negative[:, :channels], own, arguments["cond_scale"])
                if renorm_cfg > 0.0:
                    guided = guided * (_length(own) * renorm_cfg / _length(guided)).clamp(max=1.0)
                own = guided
            return arguments["input"] - torch.cat([own, rest], dim=1)

        model = model.clone()
        model.set_model_sampler_cfg_function(guide)
        return io.NodeOutput(model)


comfy_entrypoint = extension(RenormCFG)
