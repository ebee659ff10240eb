"""Control networks for Qwen-Image: InstantX's union and its inpainting network."""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import comfy.model_detection
from comfy.families.qwen_image import sizes_of_file
from comfy.ldm.qwen_image.controlnet import QwenImageControlNetModel

from .loading import StateDict, placement, with_weights
from .network import ControlNet


def instantx(sd: StateDict, model: Any, options: dict[str, Any]) -> ControlNet:
    """The hint is a latent; with a mask where the network has inputs for one."""
    config = comfy.model_detection.model_config_from_unet(sd, "")
    if config is None:
        raise ValueError("the file has the keys of a Qwen-Image ControlNet but not its blocks; use a complete file")
    place = placement(sd, config, options)
    sizes = {**config.unet_config, **sizes_of_file(sd)}
    further = sd["controlnet_x_embedder.weight"].shape[1] - sizes["in_channels"]
    network = QwenImageControlNetModel(extra_condition_channels=further, **{**sizes, **place.arguments()})
    return ControlNet(
        with_weights(network, sd, place.dtype), compression_ratio=1, latent_format=comfy.latent_formats.Wan21(),
        concat_mask=further > 0, load_device=place.device, manual_cast_dtype=place.cast, extra_conds=(),
    )  # fmt: skip
