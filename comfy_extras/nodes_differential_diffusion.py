"""Repainting whose strength follows a grey mask (arXiv 2306.00950)."""

from __future__ import annotations

from typing import Any

import torch

from comfy_api.latest import io
from comfy_nodes.v3 import extension, share


class DifferentialDiffusion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DifferentialDiffusion",
            display_name="Differential Diffusion",
            category="_for_testing",
            is_experimental=True,
            inputs=[io.Model.Input("model"), share("strength", 1.0, optional=True)],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, strength: float = 1.0):
        model = model.clone()
        model.set_model_denoise_mask_function(
            lambda sigma, denoise_mask, extra_options: cls.forward(sigma, denoise_mask, extra_options, strength)
        )
        return io.NodeOutput(model)

    apply = execute

    @classmethod
    def forward(
        cls, sigma: torch.Tensor, denoise_mask: torch.Tensor, extra_options: dict[str, Any], strength: float = 1.0
    ) -> torch.Tensor:
        """The mask of this step: a cell is repainted once the schedule is down to its grey value."""
        sampling = extra_options["model"].inner_model.model_sampling
        steps = extra_options["sigmas"]
        end = torch.maximum(steps[-1], torch.as_tensor(sampling.sigma_min).to(steps))
        first, last, now = (sampling.timestep(value) for value in (steps[0], end, sigma[0]))
        threshold = (now - last) / (first - last)
        binary = (denoise_mask >= threshold).to(denoise_mask.dtype)
        return strength * binary + (1 - strength) * denoise_mask if 0 < strength < 1 else binary


comfy_entrypoint = extension(DifferentialDiffusion)
