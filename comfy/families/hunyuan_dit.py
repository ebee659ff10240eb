"""HunyuanDiT 1.1 and 1.2 (Tencent, 2024)."""

from __future__ import annotations

from typing import Any

import torch

import comfy.conds
import comfy.latent_formats
import comfy.model_base
from comfy import supported_models_base
from comfy.families.base import Family, Sizes, Split, StateDict
from comfy.model_detection import count_blocks

_MASKS_AND_FEATURES = {
    "attention_mask": "text_embedding_mask",
    "conditioning_mt5xl": "encoder_hidden_states_t5",
    "attention_mask_mt5xl": "text_embedding_mask_t5",
}


class HunyuanDiTModel(comfy.model_base.BaseModel):
    """HunyuanDiT: BERT's and mT5's features with their masks, and sizes."""

    def __init__(
        self,
        model_config: Any,
        model_type: Any = comfy.model_base.ModelType.V_PREDICTION,
        device: Any = None,
        unet_model: Any = None,
    ) -> None:
        super().__init__(model_config, model_type, device=device, unet_model=unet_model or FAMILY.network_class())

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        cross = kwargs.get("cross_attn")
        if cross is not None:
            out["c_crossattn"] = comfy.conds.CONDRegular(cross)
        for field, argument in _MASKS_AND_FEATURES.items():
            if kwargs.get(field) is not None:
                out[argument] = comfy.conds.CONDRegular(kwargs[field])
        width, height = kwargs.get("width", 768), kwargs.get("height", 768)
        sizes = [height, width, kwargs.get("target_height", height), kwargs.get("target_width", width), 0, 0]
        out["image_meta_size"] = comfy.conds.CONDRegular(torch.FloatTensor([sizes]))
        return out


class HunyuanDiT(supported_models_base.BASE):
    """HunyuanDiT 1.2."""

    unet_config = {"image_model": "hydit"}
    unet_extra_config = {"attn_precision": torch.float32}
    sampling_settings = {"linear_start": 0.00085, "linear_end": 0.018}
    latent_format = comfy.latent_formats.SDXL
    memory_usage_factor = 1.3
    vae_key_prefix = ["vae."]
    text_encoder_key_prefix = ["text_encoders."]

    def model_type(self, state_dict: StateDict, prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.V_PREDICTION

    def get_model(self, state_dict: StateDict, prefix: str = "", device: Any = None) -> Any:
        self.unet_config |= sizes_of_file(state_dict, prefix)
        return HunyuanDiTModel(self, model_type=self.model_type(state_dict, prefix), device=device)

    def clip_target(self, state_dict: StateDict | None = None) -> supported_models_base.ClipTarget:
        from comfy.text_encoders.hydit import HyditModel, HyditTokenizer

        return supported_models_base.ClipTarget(HyditTokenizer, HyditModel)


class HunyuanDiT1(HunyuanDiT):
    """HunyuanDiT 1.1: another noise schedule, sizes and style."""

    unet_config = {"image_model": "hydit1"}
    unet_extra_config: dict[str, Any] = {}
    sampling_settings = {"linear_start": 0.00085, "linear_end": 0.03}


def sizes_of_file(sd: StateDict, prefix: str) -> dict[str, Any]:
    """Sizes that a file has and that recognition takes for granted."""
    names = {
        "head": "blocks.0.attn1.q_norm.weight",
        "mlp": "blocks.0.mlp.fc1.weight",
        "text": "blocks.0.attn2.kv_proj.weight",
        "t5": "mlp_t5.0.weight",
        "padding": "text_embedding_padding",
        "pooler": "pooler.positional_embedding",
    }
    if any(prefix + name not in sd for name in names.values()):
        return {}
    shapes = {name: sd[prefix + key].shape for name, key in names.items()}
    hidden, length_t5 = shapes["mlp"][1], shapes["pooler"][0] - 1
    old = f"{prefix}style_embedder.weight" in sd
    return {
        "num_heads": hidden // shapes["head"][0],
        "mlp_ratio": (shapes["mlp"][0] + 0.5) / hidden,  # networks round the product down
        "text_states_dim": shapes["text"][1],
        "text_states_dim_t5": shapes["t5"][1],
        "text_len": shapes["padding"][0] - length_t5,
        "text_len_t5": length_t5,
        "size_cond": old,
        "use_style_cond": old,
    }


def detect(sd: StateDict, prefix: str, metadata: dict[str, str] | None) -> dict[str, Any] | None:
    patches = sd.get(f"{prefix}x_embedder.proj.weight")
    if patches is None or f"{prefix}mlp_t5.0.weight" not in sd:
        return None
    depth, hidden = count_blocks(sd, prefix + "blocks.{}."), patches.shape[0]
    config: dict[str, Any] = {"image_model": "hydit", "depth": depth, "hidden_size": hidden}
    if (depth, hidden) == (40, 1408):
        config["mlp_ratio"] = 4.3637
    if sd[f"{prefix}extra_embedder.0.weight"].shape[1] == 3968:
        config |= {"image_model": "hydit1", "size_cond": True, "use_style_cond": True}
    return config


def _lora_keys(network: Any) -> dict[str, Any]:
    stems = [name.removesuffix(".weight") for name in network.state_dict() if name.endswith(".weight")]
    return {f"base_model.model.{stem}": f"diffusion_model.{stem}.weight" for stem in stems}


def _sizes(network: Any) -> Sizes:
    head = network.hidden_size // network.num_heads
    return {"heads": (network.hidden_size, head), "mlp": (network.mlp_size, 1)}


FAMILY = Family(
    name="hunyuan_dit",
    network="comfy.ldm.hydit.models:HunYuanDiT",
    detect=detect,
    configurations={"HunyuanDiT": HunyuanDiT, "HunyuanDiT1": HunyuanDiT1},
    models={"HunyuanDiT": HunyuanDiTModel},
    lora_keys=_lora_keys,
    clip_type="HUNYUAN_DIT",
    splits={
        "blocks.*.attn1.Wqkv": Split("column", ("heads", "heads", "heads")),
        "blocks.*.attn1.out_proj": Split("row", ("heads",)),
        "blocks.*.attn2.q_proj": Split("column", ("heads",)),
        "blocks.*.attn2.kv_proj": Split("column", ("heads", "heads"), ()),  # every rank has the prompt
        "blocks.*.attn2.out_proj": Split("row", ("heads",)),
        "blocks.*.mlp.fc1": Split("column", ("mlp",)),
        "blocks.*.mlp.fc2": Split("row", ("mlp",)),
        "blocks.*.default_modulation.1": Split("whole"),
        "blocks.*.skip_linear": Split("whole"),
    },
    sizes=_sizes,
    sizes_from_tensors=True,
    full_precision=("blocks.*.default_modulation.1",),
)
