"""UNets with a time axis (Stable Video Diffusion, SV3D): recognised, so that a file of theirs is named, but not built."""

from __future__ import annotations

from typing import Any

import torch

import comfy.latent_formats
from comfy.families import sd
from comfy.families.base import Family, StateDict
from comfy.ldm.unet import keys
from comfy.missing import missing


class SVD_img2vid(sd.UNetConfiguration):  # noqa: N801 (ComfyUI's name)
    """Stable Video Diffusion."""

    unet_config = {
        "model_channels": 320, "in_channels": 8, "use_linear_in_transformer": True,
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "context_dim": 1024, "adm_in_channels": 768,
        "use_temporal_attention": True, "use_temporal_resblock": True,
    }  # fmt: skip
    unet_extra_config = {"num_heads": -1, "num_head_channels": 64, "attn_precision": torch.float32}
    latent_format = comfy.latent_formats.SD15
    sampling_settings = {"sigma_max": 700.0, "sigma_min": 0.002}
    memory_usage_factor = 2.0
    clip_vision_prefix = "conditioner.embedders.0.open_clip.model.visual."

    def get_model(self, state_dict: StateDict, prefix: str = "", device: Any = None) -> Any:
        missing("Stable Video Diffusion")


class SV3D_u(SVD_img2vid):  # noqa: N801 (ComfyUI's name)
    """SV3D on a fixed orbit."""

    unet_config = {**SVD_img2vid.unet_config, "adm_in_channels": 256}
    vae_key_prefix = ["conditioner.embedders.1.encoder."]

    def get_model(self, state_dict: StateDict, prefix: str = "", device: Any = None) -> Any:
        missing("SV3D")


class SV3D_p(SV3D_u):  # noqa: N801 (ComfyUI's name)
    """SV3D on any orbit."""

    unet_config = {**SVD_img2vid.unet_config, "adm_in_channels": 1280}


def detect(state_dict: StateDict, prefix: str, metadata: dict[str, str] | None) -> dict[str, Any] | None:
    config = keys.unet_config(state_dict, prefix)
    return config if config is not None and config["use_temporal_attention"] else None


FAMILY = Family(
    name="svd",
    network=sd.NETWORK,
    detect=detect,
    configurations={"SVD_img2vid": SVD_img2vid},
    models={},
)
