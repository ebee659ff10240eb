"""Qwen-Image, Qwen-Image-Edit and Qwen-Image-Layered (Qwen Team 2025)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

import comfy.conds
import comfy.latent_formats
import comfy.model_base
from comfy import supported_models_base
from comfy.families.base import Family, Sizes, Split, StateDict
from comfy.model_detection import count_blocks, metadata_config


class QwenImageModel(comfy.model_base.BaseModel):
    """Qwen-Image; pictures to edit are reference latents."""

    def __init__(
        self,
        model_config: Any,
        model_type: Any = comfy.model_base.ModelType.FLUX,
        device: Any = None,
        unet_model: Any = None,
    ) -> None:
        super().__init__(model_config, model_type, device=device, unet_model=unet_model or FAMILY.network_class())
        self.memory_usage_factor_conds = ("ref_latents",)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        for field, name in (("attention_mask", "attention_mask"), ("cross_attn", "c_crossattn")):
            if kwargs.get(field) is not None:
                out[name] = comfy.conds.CONDRegular(kwargs[field])
        references = kwargs.get("reference_latents")
        if references is not None:
            out["ref_latents"] = comfy.conds.CONDList([self.process_latent_in(latent) for latent in references])
            method = kwargs.get("reference_latents_method")
            if method is not None:
                out["ref_latents_method"] = comfy.conds.CONDConstant(method)
        return out

    def extra_conds_shapes(self, **kwargs: Any) -> dict[str, Any]:
        references = kwargs.get("reference_latents")
        if references is None:
            return {}
        return {"ref_latents": [1, 16, sum(math.prod(latent.shape) for latent in references) // 16]}


class QwenImage(supported_models_base.BASE):
    """Qwen-Image and its edit versions."""

    unet_config = {"image_model": "qwen_image"}
    sampling_settings = {"multiplier": 1.0, "shift": 1.15}
    latent_format = comfy.latent_formats.Wan21
    memory_usage_factor = 1.8
    supported_inference_dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32)
    vae_key_prefix = ["vae."]
    text_encoder_key_prefix = ["text_encoders."]

    def model_type(self, state_dict: dict[str, Any], prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.FLUX

    def get_model(self, state_dict: dict[str, Any], prefix: str = "", device: Any = None) -> Any:
        return QwenImageModel(self, model_type=self.model_type(state_dict, prefix), device=device)

    def clip_target(self, state_dict: dict[str, Any] | None = None) -> supported_models_base.ClipTarget:
        import comfy.text_encoders.qwen_image as qwen_image

        return supported_models_base.ClipTarget(qwen_image.QwenImageTokenizer, qwen_image.QwenImageTEModel)


# Sizes that are fixed for Qwen-Image; other ones are taken from a file's metadata or diffusers' config.json.
_TOLD = (
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "axes_dims_rope",
    "out_channels",
    "patch_size",
)


def detect(sd: StateDict, prefix: str, metadata: dict[str, str] | None) -> dict[str, Any] | None:
    if f"{prefix}txt_norm.weight" not in sd or f"{prefix}img_in.weight" not in sd:
        return None
    config: dict[str, Any] = {
        "image_model": "qwen_image",
        "in_channels": sd[f"{prefix}img_in.weight"].shape[1],
        "num_layers": count_blocks(sd, prefix + "transformer_blocks.{}."),
    }
    if f"{prefix}__index_timestep_zero__" in sd:  # Edit 2511
        config["default_ref_method"] = "index_timestep_zero"
    if f"{prefix}time_text_embed.addition_t_embedding.weight" in sd:  # Layered
        config |= {"default_ref_method": "negative_index", "use_additional_t_cond": True}
    told = metadata_config(metadata)
    return config | {name: told[name] for name in _TOLD if name in told}


def sizes_of_file(sd: StateDict) -> dict[str, Any]:
    """Arguments of the network by a file's shapes, for networks of other sizes than Qwen-Image's.

    Of a head an eighth is for the frame, as in Qwen-Image (16, 56 and 56 of 128), and the rest for row and column.
    """
    head = sd["transformer_blocks.0.attn.norm_q.weight"].shape[0]
    frame = max(4, head // 8)
    return {
        "axes_dims_rope": [frame, (head - frame) // 2, (head - frame) // 2],
        "attention_head_dim": head,
        "num_attention_heads": sd["img_in.weight"].shape[0] // head,
        "joint_attention_dim": sd["txt_norm.weight"].shape[0],
    }


def lora_keys(network: Any) -> dict[str, Any]:
    """Adapter key prefixes beyond the weights' own names: the file's keys bare, and as trainers write them."""
    out: dict[str, Any] = {}
    for key in network.state_dict():
        if key.endswith(".weight"):
            stem, target = key.removesuffix(".weight"), f"diffusion_model.{key}"
            out |= {stem: target, f"transformer.{stem}": target, f"lycoris_{stem.replace('.', '_')}": target}
    return out


def _sizes(network: Any) -> Sizes:
    dim = network.hidden_size
    return {"heads": (dim, dim // network.num_heads), "mlp": (4 * dim, 1)}


def _splits() -> dict[str, Split]:
    """Attention in whole heads, MLPs in columns then rows; modulations are the same on every rank."""
    block = "transformer_blocks.*."
    out = {}
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
        out[f"{block}attn.{name}"] = Split("column", ("heads",))
    for name in ("to_out.0", "to_add_out"):
        out[f"{block}attn.{name}"] = Split("row", ("heads",))
    for stream in ("img", "txt"):
        out[f"{block}{stream}_mlp.net.0.proj"] = Split("column", ("mlp",))
        out[f"{block}{stream}_mlp.net.2"] = Split("row", ("mlp",))
        out[f"{block}{stream}_mod.1"] = Split("whole")
    return out


FAMILY = Family(
    name="qwen_image",
    network="comfy.ldm.qwen_image.model:QwenImageTransformer2DModel",
    detect=detect,
    configurations={"QwenImage": QwenImage},
    models={"QwenImage": QwenImageModel},
    lora_keys=lora_keys,
    splits=_splits(),
    sizes=_sizes,
)
