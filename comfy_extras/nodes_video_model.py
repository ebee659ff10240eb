"""Guidance and areas for latents whose frames are a batch or an axis of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import node_helpers
from comfy_nodes.fields import number

Scales = Callable[[int, float, float], torch.Tensor]


def linear(frames: int, low: float, high: float) -> torch.Tensor:
    """From `low` at the first frame to `high` at the last."""
    return torch.linspace(low, high, frames)


def triangle(frames: int, low: float, high: float) -> torch.Tensor:
    """`low` at both ends, `high` in the middle."""
    position = torch.linspace(0, 1, frames)
    return low + (high - low) * 2 * torch.minimum(position, 1 - position)


def guidance_by_frame(model: Any, scales: Scales, min_cfg: float) -> tuple[Any]:
    """A clone of the model whose frames (the batch) have each their own guidance scale."""

    def guide(arguments: dict[str, Any]) -> torch.Tensor:
        positive, negative = arguments["cond"], arguments["uncond"]
        scale = scales(positive.shape[0], min_cfg, arguments["cond_scale"]).to(positive)
        return torch.lerp(negative, positive, scale.view(-1, *[1] * (positive.ndim - 1)))

    model = model.clone()
    model.set_model_sampler_cfg_function(guide)
    return (model,)


class VideoLinearCFGGuidance:
    scales: Scales = staticmethod(linear)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "min_cfg": number(1.0, 0.0, 100.0, 0.5, round=0.01)}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "sampling/video_models"

    def patch(self, model: Any, min_cfg: float):
        return guidance_by_frame(model, self.scales, min_cfg)


class VideoTriangleCFGGuidance(VideoLinearCFGGuidance):
    scales: Scales = staticmethod(triangle)


class ConditioningSetAreaPercentageVideo:
    @classmethod
    def INPUT_TYPES(cls):
        sizes = {name: number(1.0, 0, 1.0, 0.01) for name in ("width", "height", "temporal")}
        places = {name: number(0, 0, 1.0, 0.01) for name in "xyz"}
        strength = {"strength": number(1.0, 0.0, 10.0, 0.01)}
        return {"required": {"conditioning": ("CONDITIONING",), **sizes, **places, **strength}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "append"
    CATEGORY = "conditioning"

    def append(
        self,
        conditioning: Any,
        width: float,
        height: float,
        temporal: float,
        x: float,
        y: float,
        z: float,
        strength: float,
    ):
        area = ("percentage", temporal, height, width, z, y, x)
        values = {"area": area, "strength": strength, "set_area_to_bounds": False}
        return (node_helpers.conditioning_set_values(conditioning, values),)


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls for cls in (VideoLinearCFGGuidance, VideoTriangleCFGGuidance, ConditioningSetAreaPercentageVideo)
}
