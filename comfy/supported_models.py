"""The model families, in the order in which they are tried (facts/reference.md, section 4)."""

from __future__ import annotations

from typing import Any

import torch

import comfy.latent_formats
import comfy.model_base
from comfy import supported_models_base
from comfy.missing import missing_names


class Flux(supported_models_base.BASE):
    """FLUX.1 dev and relatives with guidance distilled in."""

    unet_config = {"image_model": "flux", "guidance_embed": True}
    latent_format = comfy.latent_formats.Flux
    memory_usage_factor = 3.1
    supported_inference_dtypes = (torch.bfloat16, torch.float16, torch.float32)
    vae_key_prefix = ["vae."]
    text_encoder_key_prefix = ["text_encoders."]

    def model_type(self, state_dict: dict[str, Any], prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.FLUX

    def get_model(self, state_dict: dict[str, Any], prefix: str = "", device: Any = None) -> Any:
        return comfy.model_base.Flux(self, model_type=self.model_type(state_dict, prefix), device=device)

    def clip_target(self, state_dict: dict[str, Any] | None = None) -> supported_models_base.ClipTarget:
        import comfy.text_encoders.flux as flux

        detected = flux.t5_xxl_detect(state_dict or {}, "text_encoders.t5xxl.transformer.")
        return supported_models_base.ClipTarget(flux.FluxTokenizer, flux.flux_clip(**detected))


class FluxInpaint(Flux):
    """FLUX.1 Fill."""

    unet_config = {"image_model": "flux", "guidance_embed": True, "in_channels": 96}
    supported_inference_dtypes = (torch.bfloat16, torch.float32)


class FluxSchnell(Flux):
    """FLUX.1 schnell: no guidance, plain flow."""

    unet_config = {"image_model": "flux", "guidance_embed": False}
    sampling_settings = {"multiplier": 1.0, "shift": 1.0}

    def model_type(self, state_dict: dict[str, Any], prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.FLOW


models: list[type[supported_models_base.BASE]] = [FluxInpaint, Flux, FluxSchnell]


_FAMILIES = (
    "ACEStep",
    "AuraFlow",
    "Chroma",
    "ChromaRadiance",
    "CosmosI2V",
    "CosmosI2VPredict2",
    "CosmosT2IPredict2",
    "CosmosT2V",
    "GenmoMochi",
    "HiDream",
    "HunyuanDiT",
    "HunyuanDiT1",
    "HunyuanImage21",
    "HunyuanImage21Refiner",
    "HunyuanVideo",
    "HunyuanVideoI2V",
    "HunyuanVideoSkyreelsI2V",
    "Hunyuan3Dv2",
    "Hunyuan3Dv2_1",
    "Hunyuan3Dv2mini",
    "KOALA_1B",
    "KOALA_700M",
    "LTXV",
    "LotusD",
    "Lumina2",
    "Omnigen2",
    "PixArtAlpha",
    "PixArtSigma",
    "QwenImage",
    "SD15",
    "SD15_instructpix2pix",
    "SD20",
    "SD21UnclipH",
    "SD21UnclipL",
    "SD3",
    "SDXL",
    "SDXLRefiner",
    "SDXL_instructpix2pix",
    "SD_X4Upscaler",
    "SSD1B",
    "SV3D_p",
    "SV3D_u",
    "SVD_img2vid",
    "Segmind_Vega",
    "StableAudio",
    "Stable_Cascade_B",
    "Stable_Cascade_C",
    "Stable_Zero123",
    "WAN21_Camera",
    "WAN21_FunControl2V",
    "WAN21_HuMo",
    "WAN21_I2V",
    "WAN21_T2V",
    "WAN21_Vace",
    "WAN22_Animate",
    "WAN22_Camera",
    "WAN22_S2V",
    "WAN22_T2V",
)
__getattr__ = missing_names(__name__, {name: f"the model family of {name}" for name in _FAMILIES})
