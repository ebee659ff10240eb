"""Chroma (lodestone-rock, 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import comfy.conds
import comfy.model_base
from comfy import supported_models_base
from comfy.families import flux, key_maps
from comfy.families.base import Family, StateDict
from comfy.ldm.flux import keys
from comfy.model_detection import count_blocks


class ChromaModel(flux.FluxModel):
    """Chroma: as Flux, with no guidance unless it is asked for."""

    def __init__(
        self,
        model_config: Any,
        model_type: Any = comfy.model_base.ModelType.FLUX,
        device: Any = None,
        unet_model: Any = None,
    ) -> None:
        super().__init__(model_config, model_type, device=device, unet_model=unet_model or FAMILY.network_class())

    def concat_cond(self, **kwargs: Any) -> torch.Tensor | None:
        return None

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        guidance = kwargs.get("guidance", 0)
        if guidance is not None:
            out["guidance"] = comfy.conds.CONDRegular(torch.FloatTensor([guidance]))
        return out


class Chroma(supported_models_base.BASE):
    """Chroma."""

    unet_config = {"image_model": "chroma"}
    sampling_settings = {"multiplier": 1.0}
    latent_format = flux.FluxLatent
    memory_usage_factor = 3.2
    supported_inference_dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float16, torch.float32)

    def model_type(self, state_dict: StateDict, prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.FLUX

    def get_model(self, state_dict: StateDict, prefix: str = "", device: Any = None) -> Any:
        self.unet_config |= _sizes_of_file(state_dict, prefix, self.unet_config["axes_dim"])
        return ChromaModel(self, model_type=self.model_type(state_dict, prefix), device=device)

    def clip_target(self, state_dict: StateDict | None = None) -> supported_models_base.ClipTarget:
        from comfy.text_encoders.t5_family import PixArtT5XXL, PixArtTokenizer

        return supported_models_base.ClipTarget(PixArtTokenizer, PixArtT5XXL)


def _sizes_of_file(sd: StateDict, prefix: str, axes: Sequence[int]) -> dict[str, Any]:
    """Sizes that a file has and that recognition takes for granted: Flux's, and those of the small network."""
    small = f"{prefix}distilled_guidance_layer."
    first, sizes = sd.get(f"{small}in_proj.weight"), flux.sizes_of_file(sd, prefix, axes)
    if first is None or "out_channels" not in sizes:
        return {}
    sizes |= {"out_dim": sizes["hidden_size"], "out_channels": 4 * sizes["out_channels"]}
    layers = count_blocks(sd, small + "layers.{}.")
    return {**sizes, "hidden_dim": first.shape[0], "in_dim": first.shape[1], "n_layers": layers}


def detect(sd: StateDict, prefix: str, metadata: dict[str, str] | None) -> dict[str, Any] | None:
    patches = sd.get(f"{prefix}img_in.weight")
    if patches is None or f"{prefix}double_blocks.0.img_attn.norm.key_norm.scale" not in sd:
        return None
    layer = f"{prefix}distilled_guidance_layer."
    if f"{layer}norms.0.scale" not in sd and f"{layer}0.norms.0.scale" not in sd:
        return None
    return {
        "image_model": "chroma",
        "in_channels": patches.shape[1],
        "patch_size": 2,
        "out_channels": 64,
        "context_in_dim": 4096,
        "hidden_size": 3072,
        "mlp_ratio": 4.0,
        "num_heads": 24,
        "depth": count_blocks(sd, prefix + "double_blocks.{}."),
        "depth_single_blocks": count_blocks(sd, prefix + "single_blocks.{}."),
        "axes_dim": [16, 56, 56],
        "theta": 10000,
        "qkv_bias": True,
        "in_dim": 64,
        "out_dim": 3072,
        "hidden_dim": 5120,
        "n_layers": 5,
    }


def from_diffusers(state_dict: StateDict) -> StateDict | None:
    """A transformer of this family with diffusers' keys under ours, or None."""
    layer = "distilled_guidance_layer."
    if f"{layer}in_proj.weight" not in state_dict or "x_embedder.weight" not in state_dict:
        return None
    targets = key_maps.linears({f"{layer}{name}": f"{layer}{name}" for name in ("in_proj", "out_proj")})
    for i in range(count_blocks(state_dict, layer + "layers.{}.")):
        ours = {"linear_1": "in_layer", "linear_2": "out_layer"}
        targets |= key_maps.linears(ours, f"{layer}layers.{i}.", f"{layer}layers.{i}.")
        targets[f"{layer}norms.{i}.weight"] = f"{layer}norms.{i}.scale"
    return {**keys.from_diffusers(state_dict), **key_maps.assembled(state_dict, targets)}


FAMILY = Family(
    name="chroma",
    network="comfy.ldm.chroma.model:Chroma",
    detect=detect,
    configurations={"Chroma": Chroma},
    models={"Chroma": ChromaModel},
    from_diffusers=from_diffusers,
    lora_keys=keys.lora_keys,
    clip_type="CHROMA",
    splits={name: split for name, split in flux.FAMILY.splits.items() if ".mod" not in name and "_mod." not in name},
    sizes=flux.FAMILY.sizes,
    sizes_from_tensors=True,
)
