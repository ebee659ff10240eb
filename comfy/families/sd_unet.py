"""The record of UNets for pictures: Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

from typing import Any

from comfy.families import sd, sdxl, svd
from comfy.families.base import Family, StateDict
from comfy.ldm.unet import keys


def detect(state_dict: StateDict, prefix: str, metadata: dict[str, str] | None) -> dict[str, Any] | None:
    config = keys.unet_config(state_dict, prefix)
    return None if config is None or config["use_temporal_attention"] else config


FAMILY = Family(
    name="sd_unet",
    network=sd.NETWORK,
    detect=detect,
    configurations={
        "LotusD": sd.LotusD,
        "Stable_Zero123": sd.Stable_Zero123,
        "SD15_instructpix2pix": sd.SD15_instructpix2pix,
        "SD15": sd.SD15,
        "SD20": sd.SD20,
        "SD21UnclipL": sd.SD21UnclipL,
        "SD21UnclipH": sd.SD21UnclipH,
        "SDXL_instructpix2pix": sdxl.SDXL_instructpix2pix,
        "SDXLRefiner": sdxl.SDXLRefiner,
        "SDXL": sdxl.SDXL,
        "SSD1B": sdxl.SSD1B,
        "KOALA_700M": sdxl.KOALA_700M,
        "KOALA_1B": sdxl.KOALA_1B,
        "Segmind_Vega": sdxl.Segmind_Vega,
        "SD_X4Upscaler": sd.SD_X4Upscaler,
        "SV3D_u": svd.SV3D_u,
        "SV3D_p": svd.SV3D_p,
    },
    models={
        "SD15_instructpix2pix": sd.SD15EditModel,
        "SD21UNCLIP": sd.SD21UnclipModel,
        "SDXL": sdxl.SDXLModel,
        "SDXLRefiner": sdxl.SDXLRefinerModel,
        "SDXL_instructpix2pix": sdxl.SDXLEditModel,
    },
    from_diffusers=keys.from_diffusers,
    lora_keys=keys.lora_keys,
)
