"""LTX-Video 0.9, 2B and 13B (Lightricks 2024, 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import comfy.conds
import comfy.latent_formats
import comfy.model_base
from comfy import supported_models_base
from comfy.families.base import Family, Sizes, Split, StateDict
from comfy.model_detection import count_blocks, metadata_config

_FACTOR = 5.5


class LTXVModel(comfy.model_base.BaseModel):
    """LTX-Video; kept frames stay clean and are at time 0."""

    def __init__(
        self,
        model_config: Any,
        model_type: Any = comfy.model_base.ModelType.FLUX,
        device: Any = None,
        unet_model: Any = None,
    ) -> None:
        super().__init__(model_config, model_type, device=device, unet_model=unet_model or FAMILY.network_class())

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        fields = {
            "attention_mask": kwargs.get("attention_mask"),
            "c_crossattn": kwargs.get("cross_attn"),
            "denoise_mask": kwargs.get("concat_mask", kwargs.get("denoise_mask")),
            "keyframe_idxs": kwargs.get("keyframe_idxs"),
        }
        out.update({name: comfy.conds.CONDRegular(value) for name, value in fields.items() if value is not None})
        out["frame_rate"] = comfy.conds.CONDConstant(kwargs.get("frame_rate", 25))
        return out

    def process_timestep(self, timestep: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Sigmas [B] -> [B, L, 1] where a mask says how much of each token is to be made."""
        mask = kwargs.get("denoise_mask")
        if mask is None:
            return timestep
        by_place = mask[:, :1] * timestep.reshape(-1, *[1] * (mask.ndim - 1))
        return by_place.flatten(2).transpose(1, 2)

    def scale_latent_inpaint(
        self, sigma: torch.Tensor, noise: torch.Tensor, latent_image: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """The kept frames without noise."""
        return latent_image


class LTXV(supported_models_base.BASE):
    """LTX-Video."""

    widths = (("caption_projection.linear_1.weight", "caption_channels", 4096),)
    unet_config = {"image_model": "ltxv"}
    sampling_settings = {"shift": 2.37}
    latent_format = comfy.latent_formats.LTXV
    memory_usage_factor = _FACTOR
    supported_inference_dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32)
    vae_key_prefix = ["vae."]
    text_encoder_key_prefix = ["text_encoders."]

    def __init__(self, unet_config: dict[str, Any]) -> None:
        super().__init__(unet_config)
        self.memory_usage_factor = self.unet_config.get("cross_attention_dim", 2048) / 2048 * _FACTOR

    def model_type(self, state_dict: dict[str, Any], prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.FLUX

    def get_model(self, state_dict: dict[str, Any], prefix: str = "", device: Any = None) -> Any:
        return LTXVModel(self, model_type=self.model_type(state_dict, prefix), device=device)

    def clip_target(self, state_dict: dict[str, Any] | None = None) -> supported_models_base.ClipTarget:
        import comfy.text_encoders.t5_family as t5

        return supported_models_base.ClipTarget(t5.LTXVT5Tokenizer, t5.LTXVT5XXL)


def detect(sd: StateDict, prefix: str, metadata: dict[str, str] | None) -> dict[str, Any] | None:
    keys = sd.get(f"{prefix}transformer_blocks.0.attn2.to_k.weight")
    if f"{prefix}adaln_single.emb.timestep_embedder.linear_1.bias" not in sd or keys is None:
        return None
    if f"{prefix}pos_embed.proj.bias" in sd:
        return None  # PixArt with diffusers' names
    if f"{prefix}audio_adaln_single.linear.weight" in sd:
        return None  # LTX-2, a model of video and sound
    config = {
        "image_model": "ltxv",
        "num_layers": count_blocks(sd, prefix + "transformer_blocks.{}."),
        "attention_head_dim": keys.shape[0] // 32,
        "cross_attention_dim": keys.shape[1],
    }
    return {**config, **metadata_config(metadata)}


_DIFFUSERS = (
    ("proj_in.", "patchify_proj."),
    ("time_embed.", "adaln_single."),
    (".norm_q.", ".q_norm."),
    (".norm_k.", ".k_norm."),
)


def from_diffusers(state_dict: StateDict) -> StateDict | None:
    """A transformer of this family with diffusers' keys under ours, or None."""
    if "time_embed.emb.timestep_embedder.linear_1.weight" not in state_dict or "proj_in.weight" not in state_dict:
        return None
    out = {}
    for key, value in state_dict.items():
        for theirs, ours in _DIFFUSERS:
            key = key.replace(theirs, ours)
        out[key] = value
    return out


def _sizes(network: Any) -> Sizes:
    dim = network.hidden_size
    return {"heads": (dim, dim // network.num_heads), "mlp": (4 * dim, 1)}


def _splits() -> dict[str, Split]:
    """Everything in a block, in whole heads; queries' and keys' norms need the sum of squares of all of them."""
    block = "transformer_blocks.*."
    out = {}
    for attention in ("attn1", "attn2"):
        for name in ("to_q", "to_k", "to_v"):
            tokens = ("img",) if name == "to_q" or attention == "attn1" else ()  # every rank has the prompt
            out[f"{block}{attention}.{name}"] = Split("column", ("heads",), tokens)
        out[f"{block}{attention}.to_out.0"] = Split("row", ("heads",))
    out[f"{block}ff.net.0.proj"] = Split("column", ("mlp",))
    out[f"{block}ff.net.2"] = Split("row", ("mlp",))
    return out


FAMILY = Family(
    name="ltx",
    network="comfy.ldm.lightricks.model:LTXVModel",
    detect=detect,
    configurations={"LTXV": LTXV},
    models={"LTXV": LTXVModel},
    from_diffusers=from_diffusers,
    splits=_splits(),
    sizes=_sizes,
    sizes_from_tensors=True,
)
