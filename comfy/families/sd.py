"""Stable Diffusion 1 and 2, and what all UNets have in common: inpainting channels, pictures to edit, unCLIP."""

from __future__ import annotations

from typing import Any

import torch

import comfy.latent_formats
import comfy.model_base
import comfy.utils
from comfy import supported_models_base
from comfy.families.base import StateDict, network_class
from comfy.missing import missing
from comfy.text_encoders.openclip import from_openclip, to_openclip

NETWORK = "comfy.ldm.modules.diffusionmodules.openaimodel:UNetModel"
ModelType = comfy.model_base.ModelType


class UNetBase(comfy.model_base.BaseModel):
    """A UNet."""

    def __init__(self, model_config: Any, model_type: Any = ModelType.EPS, device: Any = None) -> None:
        super().__init__(model_config, model_type, device=device, unet_model=network_class(NETWORK))


class EditsPicture(UNetBase):
    """Models that follow instructions on a picture, whose latent is appended (Brooks et al. 2022)."""

    def process_ip2p_image_in(self, image: torch.Tensor) -> torch.Tensor:
        """The VAE's latent as the network takes it."""
        return image

    def concat_cond(self, **kwargs: Any) -> torch.Tensor:
        noise, image = kwargs["noise"], kwargs.get("concat_latent_image")
        image = torch.zeros_like(noise) if image is None else image
        return self.process_ip2p_image_in(comfy.model_base.fitted_latent(image.to(kwargs["device"]), noise))


class SD15EditModel(EditsPicture):
    """Instruct-pix2pix."""


class SD21UnclipModel(UNetBase):
    """Stable Diffusion 2.1 unCLIP: pictures by their CLIP embeddings."""

    def __init__(
        self, model_config: Any, noise_aug_config: dict[str, Any], model_type: Any = ModelType.V_PREDICTION,
        device: Any = None,
    ) -> None:  # fmt: skip
        from comfy.ldm.unet.noise_augmentation import CLIPEmbeddingNoiseAugmentation

        super().__init__(model_config, model_type, device=device)
        self.noise_augmentor = CLIPEmbeddingNoiseAugmentation(**noise_aug_config)

    def encode_adm(self, **kwargs: Any) -> torch.Tensor:
        """[1, adm_in_channels]; zeros without a picture."""
        from comfy.ldm.unet.noise_augmentation import unclip_vector

        given = kwargs.get("unclip_conditioning")
        if given is None:
            return torch.zeros((1, self.adm_channels))
        seed = (kwargs.get("seed") or 0) - 10
        merge = kwargs.get("unclip_noise_augment_merge", 0.05)
        return unclip_vector(given, kwargs["device"], self.noise_augmentor, merge, seed)


class UNetConfiguration(supported_models_base.BASE):
    """What the configurations of all UNets have in common."""

    model_class: type[UNetBase] = UNetBase
    memory_usage_factor = 1.0

    def get_model(self, state_dict: StateDict, prefix: str = "", device: Any = None) -> Any:
        model = self.model_class(self, self.model_type(state_dict, prefix), device=device)
        if self.inpaint_model() and not isinstance(model, EditsPicture):
            model.set_inpaint()
        return model


class SD15(UNetConfiguration):
    """Stable Diffusion 1."""

    unet_config = {
        "context_dim": 768, "model_channels": 320, "use_linear_in_transformer": False, "adm_in_channels": None,
        "use_temporal_attention": False,
    }  # fmt: skip
    unet_extra_config = {"num_heads": 8, "num_head_channels": -1}
    latent_format: Any = comfy.latent_formats.SD15

    def process_clip_state_dict(self, state_dict: StateDict) -> StateDict:
        old, new = "cond_stage_model.transformer.", "cond_stage_model.transformer.text_model."
        for key in [key for key in state_dict if key.startswith(old) and not key.startswith(new)]:
            if not key.startswith(f"{old}text_projection"):
                state_dict[new + key.removeprefix(old)] = state_dict.pop(key)
        return comfy.utils.state_dict_prefix_replace(state_dict, {"cond_stage_model.": "clip_l."}, filter_keys=True)

    def process_clip_state_dict_for_saving(self, state_dict: StateDict) -> StateDict:
        left_out = ("clip_l.transformer.text_projection.weight", "clip_l.logit_scale")
        kept = {key: value for key, value in state_dict.items() if key not in left_out}
        return comfy.utils.state_dict_prefix_replace(kept, {"clip_l.": "cond_stage_model."})

    def clip_target(self, state_dict: StateDict | None = None) -> supported_models_base.ClipTarget:
        from comfy import sd1_clip

        return supported_models_base.ClipTarget(sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel)


class SD15_instructpix2pix(SD15):  # noqa: N801 (ComfyUI's name)
    """Stable Diffusion 1 that edits a picture."""

    unet_config = {**SD15.unet_config, "in_channels": 8}
    model_class = SD15EditModel


class Stable_Zero123(SD15):  # noqa: N801 (ComfyUI's name)
    """Recognised, so that it is not taken for instruct-pix2pix."""

    unet_config = {**SD15.unet_config, "in_channels": 8}
    required_keys = {"cc_projection.weight": None, "cc_projection.bias": None}
    memory_usage_factor = 2.0
    clip_vision_prefix = "cond_stage_model.model.visual."

    def get_model(self, state_dict: StateDict, prefix: str = "", device: Any = None) -> Any:
        missing("Stable Zero123")


class SD20(UNetConfiguration):
    """Stable Diffusion 2."""

    unet_config = {
        "context_dim": 1024, "model_channels": 320, "use_linear_in_transformer": True, "adm_in_channels": None,
        "use_temporal_attention": False,
    }  # fmt: skip
    unet_extra_config = {"num_heads": -1, "num_head_channels": 64, "attn_precision": torch.float32}
    latent_format: Any = comfy.latent_formats.SD15

    def model_type(self, state_dict: StateDict, prefix: str = "") -> ModelType:
        """Files do not say whether the network predicts velocities; this bias varies more in those that do."""
        bias = state_dict.get(f"{prefix}output_blocks.11.1.transformer_blocks.0.norm1.bias")
        if self.unet_config["in_channels"] == 4 and bias is not None and bias.float().std(unbiased=False) > 0.09:
            return ModelType.V_PREDICTION
        return ModelType.EPS

    def process_clip_state_dict(self, state_dict: StateDict) -> StateDict:
        prefixes = {"conditioner.embedders.0.model.": "", "cond_stage_model.model.": ""}
        tower = comfy.utils.state_dict_prefix_replace(state_dict, prefixes, filter_keys=True)
        return {f"clip_h.transformer.{key}": value for key, value in from_openclip(tower).items()}

    def process_clip_state_dict_for_saving(self, state_dict: StateDict) -> StateDict:
        tower = {key.removeprefix("clip_h.transformer."): value for key, value in state_dict.items()}
        return {f"cond_stage_model.model.{key}": value for key, value in to_openclip(tower).items()}

    def clip_target(self, state_dict: StateDict | None = None) -> supported_models_base.ClipTarget:
        from comfy.text_encoders import sd2_clip

        return supported_models_base.ClipTarget(sd2_clip.SD2Tokenizer, sd2_clip.SD2ClipModel)


class SD21UnclipL(SD20):
    """Stable Diffusion 2.1 unCLIP on CLIP ViT-L."""

    unet_config = {**SD20.unet_config, "adm_in_channels": 1536}
    clip_vision_prefix = "embedder.model.visual."
    noise_aug_config = {
        "noise_schedule_config": {"timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}, "timestep_dim": 768,
    }  # fmt: skip

    def get_model(self, state_dict: StateDict, prefix: str = "", device: Any = None) -> Any:
        assert self.noise_aug_config is not None
        return SD21UnclipModel(self, self.noise_aug_config, self.model_type(state_dict, prefix), device=device)


class SD21UnclipH(SD21UnclipL):
    """Stable Diffusion 2.1 unCLIP on CLIP ViT-H."""

    unet_config = {**SD20.unet_config, "adm_in_channels": 2048}
    noise_aug_config = {
        "noise_schedule_config": {"timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}, "timestep_dim": 1024,
    }  # fmt: skip


class LotusD(SD20):
    """Recognised, so that it is not taken for Stable Diffusion 2."""

    unet_config = {
        "model_channels": 320, "use_linear_in_transformer": True, "use_temporal_attention": False,
        "adm_in_channels": 4, "in_channels": 4,
    }  # fmt: skip
    unet_extra_config = {"num_classes": "sequential"}

    def get_model(self, state_dict: StateDict, prefix: str = "", device: Any = None) -> Any:
        missing("Lotus")


class SD_X4Upscaler(SD20):  # noqa: N801 (ComfyUI's name)
    """Recognised, so that it is not taken for Stable Diffusion 2."""

    unet_config = {
        "context_dim": 1024, "model_channels": 256, "in_channels": 7, "use_linear_in_transformer": True,
        "adm_in_channels": None, "use_temporal_attention": False,
    }  # fmt: skip
    unet_extra_config = {
        "disable_self_attentions": [True, True, True, False], "num_classes": 1000, "num_heads": 8,
        "num_head_channels": -1,
    }  # fmt: skip
    latent_format: Any = comfy.latent_formats.SD_X4
    sampling_settings = {"linear_start": 0.0001, "linear_end": 0.02}

    def get_model(self, state_dict: StateDict, prefix: str = "", device: Any = None) -> Any:
        missing("the x4 upscaler of Stable Diffusion 2")
