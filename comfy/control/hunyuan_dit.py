"""Control networks for HunyuanDiT."""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import comfy.model_detection
from comfy.families.hunyuan_dit import sizes_of_file
from comfy.ldm.hydit.controlnet import HunYuanControlNet

from .loading import StateDict, placement, with_weights
from .network import ControlNet

_CONDITIONINGS = (
    "text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5", "image_meta_size", "style",
)  # fmt: skip


def load(sd: StateDict, model: Any, options: dict[str, Any]) -> ControlNet:
    """Tencent's canny, depth and pose: the hint is a latent."""
    config = comfy.model_detection.model_config_from_unet(sd, "")
    if config is None:
        raise ValueError("the file has the keys of a HunyuanDiT ControlNet but not its blocks; use a complete file")
    place = placement(sd, config, options)
    sizes = {**config.unet_config, **sizes_of_file(sd, ""), **place.arguments()}
    network = with_weights(HunYuanControlNet(**sizes), sd, place.dtype)
    return ControlNet(
        network, compression_ratio=1, latent_format=comfy.latent_formats.SDXL(), load_device=place.device,
        manual_cast_dtype=place.cast, extra_conds=_CONDITIONINGS,
    )  # fmt: skip
