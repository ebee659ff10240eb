"""Guidance scaled by frequency (FreSca, arXiv 2504.02154)."""

from __future__ import annotations

from typing import Any

import torch

from comfy_api.latest import io
from comfy_nodes.v3 import extension


def scale_frequencies(x: torch.Tensor, low: float, high: float, cutoff: int) -> torch.Tensor:
    """x [B, C, ..., H, W] with spatial frequencies -cutoff to cutoff - 1 times `low`, all others times `high`.

    In videos the frames that far from the middle one count as low, as in ComfyUI.
    """
    inside = torch.ones((), dtype=torch.bool, device=x.device)
    for dim in range(2, x.ndim):
        size = x.shape[dim]
        reach = min(cutoff, size // 2)
        index = torch.arange(size, device=x.device) - size // 2
        if dim >= x.ndim - 2:
            index = torch.fft.ifftshift(index)
        inside = inside & ((index >= -reach) & (index < reach)).view(-1, *[1] * (x.ndim - 1 - dim))
    spectrum = torch.fft.fftn(x.float(), dim=(-2, -1))
    return torch.fft.ifftn(spectrum * torch.where(inside, low, high), dim=(-2, -1)).real.to(x.dtype)


class FreSca(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FreSca",
            display_name="FreSca",
            category="_for_testing",
            is_experimental=True,
            description="Scales low and high frequencies of the guidance on their own.",
            inputs=[
                io.Model.Input("model"),
                io.Float.Input("scale_low", default=1.0, min=0, max=10, step=0.01, tooltip="Of low frequencies."),
                io.Float.Input("scale_high", default=1.25, min=0, max=10, step=0.01, tooltip="Of high frequencies."),
                io.Int.Input("freq_cutoff", default=20, min=1, max=10000, step=1, tooltip="Low ones are below this."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, scale_low: float, scale_high: float, freq_cutoff: int):
        def filtered(arguments: dict[str, Any]) -> list[Any]:
            predictions = arguments["conds_out"]
            if len(predictions) < 2 or any(cond is None for cond in arguments["conds"][:2]):
                return predictions
            positive, negative = predictions[:2]
            guidance = scale_frequencies(positive - negative, scale_low, scale_high, freq_cutoff)
            return [guidance + negative, negative, *predictions[2:]]

        model = model.clone()
        model.set_model_sampler_pre_cfg_function(filtered)
        return io.NodeOutput(model)


comfy_entrypoint = extension(FreSca)
