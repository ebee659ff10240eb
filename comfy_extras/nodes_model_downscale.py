"""Smaller pictures inside a UNet in the first steps, against doubled subjects at large sizes (Kohya's Deep Shrink)."""

from __future__ import annotations

from typing import Any

import torch

import comfy.utils
from comfy_api.latest import io
from comfy_nodes.v3 import extension, share

METHODS = ["bicubic", "nearest-exact", "bilinear", "area", "bislerp"]


class PatchModelAddDownscale(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PatchModelAddDownscale",
            display_name="PatchModelAddDownscale (Kohya Deep Shrink)",
            category="model_patches/unet",
            inputs=[
                io.Model.Input("model"),
                io.Int.Input("block_number", default=3, min=1, max=32, step=1),
                share("downscale_factor", 2.0, 9.0, 0.1, 0.001),
                share("start_percent", 0.0, step=0.001),
                share("end_percent", 0.35, step=0.001),
                io.Boolean.Input("downscale_after_skip", default=True),
                io.Combo.Input("downscale_method", options=METHODS),
                io.Combo.Input("upscale_method", options=METHODS),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls, model: Any, block_number: int, downscale_factor: float, start_percent: float, end_percent: float,
        downscale_after_skip: bool, downscale_method: str, upscale_method: str,
    ):  # fmt: skip
        """Input block `block_number` shrinks its picture while sigma is in the range; output blocks undo it."""
        sampling = model.get_model_object("model_sampling")
        first, last = sampling.percent_to_sigma(start_percent), sampling.percent_to_sigma(end_percent)

        def shrink(h: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
            if options["block"][1] != block_number or not last <= options["sigmas"][0].item() <= first:
                return h
            width, height = (round(h.shape[axis] / downscale_factor) for axis in (-1, -2))
            return comfy.utils.common_upscale(h, width, height, downscale_method, "disabled")

        def grow(h: torch.Tensor, skip: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
            if h.shape[2:] != skip.shape[2:]:
                h = comfy.utils.common_upscale(h, skip.shape[-1], skip.shape[-2], upscale_method, "disabled")
            return h, skip

        shrink.rows_independent = grow.rows_independent = True  # type: ignore[attr-defined]
        model = model.clone()
        if downscale_after_skip:
            model.set_model_input_block_patch_after_skip(shrink)
        else:
            model.set_model_input_block_patch(shrink)
        model.set_model_output_block_patch(grow)
        return io.NodeOutput(model)

    patch = execute


comfy_entrypoint = extension(PatchModelAddDownscale)
