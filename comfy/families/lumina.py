"""Lumina-Image 2.0 (Alpha-VLLM, 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import comfy.conds
import comfy.model_base
from comfy import supported_models_base
from comfy.families import flux
from comfy.families.base import Family, Sizes, Split, StateDict
from comfy.model_detection import count_blocks


class Lumina2Model(comfy.model_base.BaseModel):
    """Lumina 2: text, with its mask where some of it is padding."""

    def __init__(
        self,
        model_config: Any,
        model_type: Any = comfy.model_base.ModelType.FLOW,
        device: Any = None,
        unet_model: Any = None,
    ) -> None:
        super().__init__(model_config, model_type, device=device, unet_model=unet_model or FAMILY.network_class())

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            count = int(mask.sum())
            if count != mask.numel():
                out["attention_mask"] = comfy.conds.CONDRegular(mask)
            out["num_tokens"] = comfy.conds.CONDConstant(max(1, count))
        cross = kwargs.get("cross_attn")
        if cross is not None:
            out["c_crossattn"] = comfy.conds.CONDRegular(cross)
        return out


class Lumina2(supported_models_base.BASE):
    """Lumina-Image 2.0."""

    unet_config = {"image_model": "lumina2"}
    sampling_settings = {"multiplier": 1.0, "shift": 6.0}
    latent_format = flux.FluxLatent
    memory_usage_factor = 1.2
    supported_inference_dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32)
    vae_key_prefix = ["vae."]
    text_encoder_key_prefix = ["text_encoders."]

    def model_type(self, state_dict: StateDict, prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.FLOW

    def get_model(self, state_dict: StateDict, prefix: str = "", device: Any = None) -> Any:
        self.unet_config |= _sizes_of_file(state_dict, prefix)
        return Lumina2Model(self, model_type=self.model_type(state_dict, prefix), device=device)

    def clip_target(self, state_dict: StateDict | None = None) -> supported_models_base.ClipTarget:
        from comfy.text_encoders.lumina2 import LuminaModel, LuminaTokenizer

        return supported_models_base.ClipTarget(LuminaTokenizer, LuminaModel)


def _sizes_of_file(sd: StateDict, prefix: str) -> dict[str, Any]:
    """Sizes that a file has and that recognition takes for granted."""
    names = {"patches": "x_embedder.weight", "qkv": "layers.0.attention.qkv.weight",
             "norm": "layers.0.attention.q_norm.weight"}  # fmt: skip
    if any(prefix + name not in sd for name in names.values()):
        return {}
    shapes = {name: sd[prefix + key].shape for name, key in names.items()}
    (dim, inputs), head = shapes["patches"], shapes["norm"][0]
    heads = dim // head
    sizes: dict[str, Any] = {
        "dim": dim,
        "in_channels": inputs // 4,
        "n_heads": heads,
        "n_kv_heads": (shapes["qkv"][0] // head - heads) // 2,
        "n_refiner_layers": count_blocks(sd, prefix + "noise_refiner.{}."),
    }
    if head % 6 == 0:
        sizes["axes_dims"] = [head // 3] * 3
    return sizes


def detect(sd: StateDict, prefix: str, metadata: dict[str, str] | None) -> dict[str, Any] | None:
    caption = sd.get(f"{prefix}cap_embedder.1.weight")
    if caption is None:
        return None
    return {
        "image_model": "lumina2",
        "patch_size": 2,
        "in_channels": 16,
        "dim": 2304,
        "cap_feat_dim": caption.shape[1],
        "n_layers": count_blocks(sd, prefix + "layers.{}."),
        "n_heads": 24,
        "n_kv_heads": 8,
        "qk_norm": True,
        "axes_dims": [32, 32, 32],
        "axes_lens": [300, 512, 512],
    }


def _sizes(network: Any) -> Sizes:
    head = network.hidden_size // network.num_heads
    mlp = network.layers[0].feed_forward.w1.out_features
    group = network.hidden_size // network.kv_heads  # query heads with their key head
    return {"heads": (network.hidden_size, group), "kv": (network.kv_heads * head, head), "mlp": (mlp, 1)}


def _splits() -> dict[str, Split]:
    out = {}
    for blocks, tokens in (("noise_refiner", ("img",)), ("layers", None)):
        out[f"{blocks}.*.attention.qkv"] = Split("column", ("heads", "kv", "kv"), tokens)
        out[f"{blocks}.*.attention.out"] = Split("row", ("heads",), tokens)
        for name in ("w1", "w3"):
            out[f"{blocks}.*.feed_forward.{name}"] = Split("column", ("mlp",), tokens)
        out[f"{blocks}.*.feed_forward.w2"] = Split("row", ("mlp",), tokens)
        out[f"{blocks}.*.adaLN_modulation.1"] = Split("gathered")
    return out


FAMILY = Family(
    name="lumina2",
    network="comfy.ldm.lumina.model:NextDiT",
    detect=detect,
    configurations={"Lumina2": Lumina2},
    models={"Lumina2": Lumina2Model},
    clip_type="LUMINA2",
    splits=_splits(),
    sizes=_sizes,
    sizes_from_tensors=True,
    full_precision=("*.adaLN_modulation.1",),
)
