"""Stable Diffusion XL: base, refiner, instruct-pix2pix, Playground 2.5, and networks distilled from it."""

from __future__ import annotations

from typing import Any

import torch

import comfy.latent_formats
import comfy.model_base
import comfy.utils
from comfy import supported_models_base
from comfy.families.base import StateDict
from comfy.families.sd import EditsPicture, UNetBase, UNetConfiguration
from comfy.text_encoders.openclip import from_openclip, to_openclip

SIZE_FEATURES = 256
POOLED_WIDTH = 1280
ModelType = comfy.model_base.ModelType


def sdxl_pooled(args: dict[str, Any], noise_augmentor: Any) -> torch.Tensor:
    """The pooled text [1, 1280] of a conditioning, or the pictures that stand in for it (ReVision)."""
    from comfy.ldm.unet.noise_augmentation import unclip_vector

    if "unclip_conditioning" not in args:
        return args["pooled_output"]
    seed = (args.get("seed") or 0) - 10
    return unclip_vector(args["unclip_conditioning"], args["device"], noise_augmentor, seed=seed)[:, :POOLED_WIDTH]


def _with_sizes(pooled: torch.Tensor, sizes: list[float]) -> torch.Tensor:
    """[B, P] -> [B, P + 256 * len(sizes)] (Podell et al. 2023, section 2.2)."""
    from comfy.ldm.modules.diffusionmodules.util import timestep_embedding

    features = timestep_embedding(torch.tensor(sizes, dtype=torch.float32), SIZE_FEATURES).flatten()
    features = features.to(pooled.device).unsqueeze(0).repeat(pooled.shape[0], 1)
    return torch.cat((pooled, features), dim=1)


class SDXLBaseModel(UNetBase):
    """What base and refiner have in common."""

    def __init__(self, model_config: Any, model_type: Any = ModelType.EPS, device: Any = None) -> None:
        from comfy.ldm.unet.noise_augmentation import CLIPEmbeddingNoiseAugmentation

        super().__init__(model_config, model_type, device=device)
        self.noise_augmentor = CLIPEmbeddingNoiseAugmentation(timestep_dim=POOLED_WIDTH)


class SDXLModel(SDXLBaseModel):
    """SDXL base."""

    def encode_adm(self, **kwargs: Any) -> torch.Tensor:
        """Pooled text, original size, crop and target size; height before width. [1, 2816]."""
        width, height = kwargs.get("width", 768), kwargs.get("height", 768)
        crop = [kwargs.get("crop_h", 0), kwargs.get("crop_w", 0)]
        target = [kwargs.get("target_height", height), kwargs.get("target_width", width)]
        return _with_sizes(sdxl_pooled(kwargs, self.noise_augmentor), [height, width, *crop, *target])


class SDXLRefinerModel(SDXLBaseModel):
    """SDXL refiner."""

    def encode_adm(self, **kwargs: Any) -> torch.Tensor:
        """Pooled text, size, crop and aesthetic score, which is low for the negative prompt. [1, 2560]."""
        usual = 2.5 if kwargs.get("prompt_type", "") == "negative" else 6.0
        score = kwargs.get("aesthetic_score", usual)
        size = [kwargs.get("height", 768), kwargs.get("width", 768)]
        crop = [kwargs.get("crop_h", 0), kwargs.get("crop_w", 0)]
        return _with_sizes(sdxl_pooled(kwargs, self.noise_augmentor), [*size, *crop, score])


class SDXLEditModel(EditsPicture, SDXLModel):
    """SDXL trained to follow instructions on a picture; CosXL's takes the picture in the network's range."""

    def process_ip2p_image_in(self, image: torch.Tensor) -> torch.Tensor:
        if self.model_type == ModelType.V_PREDICTION_EDM:
            return comfy.latent_formats.SDXL().process_in(image)
        return image


class SDXL(UNetConfiguration):
    """SDXL base and its fine-tuned relatives."""

    unet_config = {
        "model_channels": 320, "use_linear_in_transformer": True, "transformer_depth": [0, 0, 2, 2, 10, 10],
        "context_dim": 2048, "adm_in_channels": 2816, "use_temporal_attention": False,
    }  # fmt: skip
    unet_extra_config = {"num_heads": -1, "num_head_channels": 64}
    latent_format: Any = comfy.latent_formats.SDXL
    memory_usage_factor = 0.8
    model_class: type[UNetBase] = SDXLModel

    def model_type(self, state_dict: StateDict, prefix: str = "") -> ModelType:
        """What the file's marker keys say: Playground 2.5 (EDM), CosXL (v, EDM noise), v-prediction."""
        settings = self.sampling_settings
        if "edm_mean" in state_dict and "edm_std" in state_dict:
            self.latent_format = comfy.latent_formats.SDXL_Playground_2_5()
            settings.update(sigma_data=0.5, sigma_max=80.0, sigma_min=0.002)
            return ModelType.EDM
        if "edm_vpred.sigma_max" in state_dict:
            for name in ("sigma_max", "sigma_min"):
                if f"edm_vpred.{name}" in state_dict:
                    settings[name] = float(state_dict[f"edm_vpred.{name}"].item())
            return ModelType.V_PREDICTION_EDM
        if "v_pred" in state_dict:
            if "ztsnr" in state_dict:
                settings["zsnr"] = True
            return ModelType.V_PREDICTION
        return ModelType.EPS

    def process_clip_state_dict(self, state_dict: StateDict) -> StateDict:
        prefixes = {
            "conditioner.embedders.0.transformer.text_model.": "clip_l.transformer.text_model.",
            "conditioner.embedders.1.model.": "clip_g.",
        }
        return _split_openclip(comfy.utils.state_dict_prefix_replace(state_dict, prefixes, filter_keys=True), "clip_g.")

    def process_clip_state_dict_for_saving(self, state_dict: StateDict) -> StateDict:
        return _saved(state_dict, {"clip_l.": "conditioner.embedders.0."}, "conditioner.embedders.1.model.")

    def clip_target(self, state_dict: StateDict | None = None) -> supported_models_base.ClipTarget:
        from comfy import sdxl_clip

        return supported_models_base.ClipTarget(sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel)


def _split_openclip(state_dict: StateDict, prefix: str) -> StateDict:
    """The weights below `prefix` from OpenCLIP's keys to the encoder's; others as they are."""
    tower = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    out = {key: value for key, value in state_dict.items() if not key.startswith(prefix)}
    return {**out, **{f"{prefix}transformer.{key}": value for key, value in from_openclip(tower).items()}}


def _saved(state_dict: StateDict, plain: dict[str, str], bigg: str) -> StateDict:
    """Encoders' weights under the keys of Stability AI's files: `plain` prefixes renamed, bigG with OpenCLIP's keys."""
    tower = {k.removeprefix("clip_g.transformer."): v for k, v in state_dict.items() if k.startswith("clip_g.")}
    out = {bigg + key: value for key, value in to_openclip(tower).items()}
    for key, value in state_dict.items():
        for prefix, new in plain.items():
            if key.startswith(prefix) and not key.endswith((".text_projection.weight", ".logit_scale")):
                out[new + key.removeprefix(prefix)] = value
    if "clip_g.logit_scale" in state_dict:
        out[f"{bigg}logit_scale"] = state_dict["clip_g.logit_scale"]
    return out


class SDXLRefiner(SDXL):
    """SDXL refiner: bigG alone."""

    unet_config = {
        "model_channels": 384, "use_linear_in_transformer": True, "context_dim": 1280, "adm_in_channels": 2560,
        "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0], "use_temporal_attention": False,
    }  # fmt: skip
    memory_usage_factor = 1.0
    model_class = SDXLRefinerModel

    def model_type(self, state_dict: StateDict, prefix: str = "") -> ModelType:
        return ModelType.EPS

    def process_clip_state_dict(self, state_dict: StateDict) -> StateDict:
        prefixes = {"conditioner.embedders.0.model.": "clip_g."}
        return _split_openclip(comfy.utils.state_dict_prefix_replace(state_dict, prefixes, filter_keys=True), "clip_g.")

    def process_clip_state_dict_for_saving(self, state_dict: StateDict) -> StateDict:
        return _saved(state_dict, {}, "conditioner.embedders.0.model.")

    def clip_target(self, state_dict: StateDict | None = None) -> supported_models_base.ClipTarget:
        from comfy import sdxl_clip

        return supported_models_base.ClipTarget(sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLRefinerClipModel)


class SDXL_instructpix2pix(SDXL):  # noqa: N801 (ComfyUI's name)
    """SDXL that edits a picture."""

    unet_config = {**SDXL.unet_config, "in_channels": 8}
    model_class = SDXLEditModel


class SSD1B(SDXL):
    """Segmind SSD-1B: SDXL with half of the transformer blocks (Gupta et al. 2024)."""

    unet_config = {**SDXL.unet_config, "transformer_depth": [0, 0, 2, 2, 4, 4]}


class Segmind_Vega(SDXL):  # noqa: N801 (ComfyUI's name)
    """Segmind Vega: fewer still."""

    unet_config = {**SDXL.unet_config, "transformer_depth": [0, 0, 1, 1, 2, 2]}


class KOALA_700M(SDXL):  # noqa: N801 (ComfyUI's name)
    """KOALA 700M (Lee et al. 2023)."""

    unet_config = {**SDXL.unet_config, "transformer_depth": [0, 2, 5]}


class KOALA_1B(SDXL):  # noqa: N801 (ComfyUI's name)
    """KOALA 1B."""

    unet_config = {**SDXL.unet_config, "transformer_depth": [0, 2, 6]}
