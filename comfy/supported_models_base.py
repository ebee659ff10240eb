"""What a model family declares about itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import comfy.latent_formats
import comfy.model_base
import comfy.utils


class ClipTarget:
    """The tokenizer class and text-encoder class of a family, with their parameters."""

    def __init__(self, tokenizer: Any, clip: Any) -> None:
        self.clip = clip
        self.tokenizer = tokenizer
        self.params: dict[str, Any] = {}


class BASE:
    """One model family: how it is recognised, built, and stored."""

    unet_config: dict[str, Any] = {}
    unet_extra_config: dict[str, Any] = {}
    # (weight, argument of the network, what it is in all published models): widths that a smaller file may have otherwise
    widths: tuple[tuple[str, str, int], ...] = ()
    required_keys: dict[str, Any] = {}
    clip_prefix: list[str] = []
    clip_vision_prefix: str | None = None
    noise_aug_config: dict[str, Any] | None = None
    sampling_settings: dict[str, Any] = {}
    latent_format: Any = comfy.latent_formats.LatentFormat
    vae_key_prefix: list[str] = ["first_stage_model."]
    text_encoder_key_prefix: list[str] = ["cond_stage_model."]
    supported_inference_dtypes: Sequence[torch.dtype] = (torch.float16, torch.bfloat16, torch.float32)
    memory_usage_factor: float = 2.0
    manual_cast_dtype: torch.dtype | None = None
    custom_operations: Any = None
    scaled_fp8: torch.dtype | None = None
    optimizations: dict[str, Any] = {"fp8": False}

    @classmethod
    def matches(cls, unet_config: dict[str, Any], state_dict: dict[str, Any] | None = None) -> bool:
        """Whether a detected configuration (and the file's keys) are of this family."""
        if any(name not in unet_config or unet_config[name] != value for name, value in cls.unet_config.items()):
            return False
        return state_dict is None or all(key in state_dict for key in cls.required_keys)

    def __init__(self, unet_config: dict[str, Any]) -> None:
        self.unet_config = {**unet_config, **self.unet_extra_config}
        self.sampling_settings = dict(self.sampling_settings)
        self.latent_format = self.latent_format()
        self.optimizations = dict(self.optimizations)

    def model_type(self, state_dict: dict[str, Any], prefix: str = "") -> comfy.model_base.ModelType:
        """What the network predicts."""
        return comfy.model_base.ModelType.EPS

    def inpaint_model(self) -> bool:
        """Whether the network takes a masked picture."""
        return self.unet_config["in_channels"] > 4

    def get_model(self, state_dict: dict[str, Any], prefix: str = "", device: Any = None) -> Any:
        """The model, without weights."""
        return comfy.model_base.BaseModel(self, model_type=self.model_type(state_dict, prefix), device=device)

    def process_clip_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Text-encoder tensors of a checkpoint, under the encoder's keys."""
        prefixes = dict.fromkeys(self.text_encoder_key_prefix, "")
        return comfy.utils.state_dict_prefix_replace(state_dict, prefixes, filter_keys=True)

    def process_unet_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Diffusion tensors as the network wants them."""
        return state_dict

    def process_vae_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """VAE tensors as the VAE wants them."""
        return state_dict

    def process_clip_state_dict_for_saving(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Text-encoder tensors under checkpoint keys."""
        return comfy.utils.state_dict_prefix_replace(dict(state_dict), {"": self.text_encoder_key_prefix[0]})

    def process_unet_state_dict_for_saving(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Diffusion tensors under checkpoint keys."""
        return comfy.utils.state_dict_prefix_replace(dict(state_dict), {"": "model.diffusion_model."})

    def process_clip_vision_state_dict_for_saving(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """An image encoder's weights under the keys of a checkpoint file."""
        return {f"{self.clip_vision_prefix or ''}{key}": value for key, value in state_dict.items()}

    def process_vae_state_dict_for_saving(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """VAE tensors under checkpoint keys."""
        return comfy.utils.state_dict_prefix_replace(dict(state_dict), {"": self.vae_key_prefix[0]})

    def set_inference_dtype(self, dtype: torch.dtype | None, manual_cast_dtype: torch.dtype | None) -> None:
        """Storage dtype of the weights, and the dtype to cast to at use (None: as stored)."""
        self.unet_config["dtype"] = dtype
        self.manual_cast_dtype = manual_cast_dtype

    def clip_target(self, state_dict: dict[str, Any] | None = None) -> ClipTarget | None:
        """The family's text encoders as found in a checkpoint."""
        return None
