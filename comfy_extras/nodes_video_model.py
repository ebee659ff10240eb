"""Checkpoints with an image encoder in place of text encoders; guidance and areas for latents whose frames are a batch or an
axis of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import folder_paths
import node_helpers
from comfy_extras.nodes_model_merging import CheckpointSave
from comfy_nodes.fields import number
from comfy_nodes.loaders import files
from comfy_nodes.model_files import watches_files

Scales = Callable[[int, float, float], torch.Tensor]


@watches_files(ckpt_name="checkpoints")
class ImageOnlyCheckpointLoader:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"ckpt_name": (files("checkpoints"),)}}

    RETURN_TYPES = ("MODEL", "CLIP_VISION", "VAE")
    FUNCTION = "load_checkpoint"
    CATEGORY = "loaders/video_models"

    def load_checkpoint(self, ckpt_name: str, output_vae: bool = True, output_clip: bool = True):
        """The image encoder is None where the checkpoint has none."""
        import comfy.sd

        path = folder_paths.get_full_path_or_raise("checkpoints", ckpt_name)
        model, _, vae, vision = comfy.sd.load_checkpoint_guess_config(path, output_clip=False, output_clipvision=True)
        return model, vision, vae


class ImageOnlyCheckpointSave(CheckpointSave):
    PARTS = {"model": "MODEL", "clip_vision": "CLIP_VISION", "vae": "VAE"}


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
    cls.__name__: cls
    for cls in (
        ImageOnlyCheckpointLoader,
        ImageOnlyCheckpointSave,
        VideoLinearCFGGuidance,
        VideoTriangleCFGGuidance,
        ConditioningSetAreaPercentageVideo,
    )
}
NODE_DISPLAY_NAME_MAPPINGS = {"ImageOnlyCheckpointLoader": "Image Only Checkpoint Loader (img2vid model)"}
