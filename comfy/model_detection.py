"""Which family a state dict belongs to, and the sizes of its network.

Families are told apart by keys; sizes are read from tensor shapes. What shapes cannot tell (Flux's rotary axes) comes
from a JSON `config` in the file's metadata, else from the family's usual proportion.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import torch

import comfy.supported_models
import comfy.utils
from comfy.ldm.flux.keys import from_diffusers

UNET_PREFIXES = ("model.diffusion_model.", "model.model.", "net.")

StateDict = dict[str, torch.Tensor]


def count_blocks(state_dict_keys: Any, prefix_string: str) -> int:
    """Number of consecutive indices i for which a key begins with `prefix_string.format(i)`."""
    keys = list(state_dict_keys)
    count = 0
    while any(key.startswith(prefix_string.format(count)) for key in keys):
        count += 1
    return count


def rotary_axes(head_size: int) -> list[int]:
    """Flux's split of the head size over picture index, row and column: 1/8, 7/16, 7/16, all even."""
    candidates = [first for first in range(2, head_size, 2) if (head_size - first) % 4 == 0]
    if not candidates:
        raise ValueError(f"a head size of {head_size} cannot be split into three even rotary axes")
    first = min(candidates, key=lambda size: (abs(size - head_size / 8), -size))
    rest = (head_size - first) // 2
    return [first, rest, rest]


def _metadata_config(metadata: dict[str, str] | None) -> dict[str, Any]:
    """The network configuration in a file's metadata: `config` itself or its `transformer` part."""
    if not metadata or "config" not in metadata:
        return {}
    try:
        config = json.loads(metadata["config"])
    except json.JSONDecodeError as error:
        logging.warning("the file's metadata has a config that is not JSON (%s); it is ignored", error)
        return {}
    return config.get("transformer", config) if isinstance(config, dict) else {}


def _detect_flux(sd: StateDict, prefix: str, metadata: dict[str, str] | None) -> dict[str, Any] | None:
    key_norm = f"{prefix}double_blocks.0.img_attn.norm.key_norm.scale"
    img_in = f"{prefix}img_in.weight"
    if key_norm not in sd or img_in not in sd or f"{prefix}distilled_guidance_layer.norms.0.scale" in sd:
        return None
    if f"{prefix}txt_in.individual_token_refiner.blocks.0.norm1.weight" in sd:
        return None  # HunyuanVideo shares Flux's block names
    patch = 2
    hidden, in_features = sd[img_in].shape
    head_size = sd[key_norm].shape[0]
    config: dict[str, Any] = {
        "image_model": "flux",
        "in_channels": in_features // patch**2,
        "patch_size": patch,
        "out_channels": 16,
    }
    final = sd.get(f"{prefix}final_layer.linear.weight")
    if final is not None:
        config["out_channels"] = final.shape[0] // patch**2
    vector_in = sd.get(f"{prefix}vector_in.in_layer.weight")
    if vector_in is not None:
        config["vec_in_dim"] = vector_in.shape[1]
    txt_in = sd.get(f"{prefix}txt_in.weight")
    mlp = sd.get(f"{prefix}double_blocks.0.img_mlp.0.weight")
    config |= {
        "context_in_dim": 4096 if txt_in is None else txt_in.shape[1],
        "hidden_size": hidden,
        "mlp_ratio": 4.0 if mlp is None else mlp.shape[0] / hidden,
        "num_heads": hidden // head_size,
        "depth": count_blocks(sd, prefix + "double_blocks.{}."),
        "depth_single_blocks": count_blocks(sd, prefix + "single_blocks.{}."),
        "axes_dim": rotary_axes(head_size),
        "theta": 10000,
        "qkv_bias": mlp is None or f"{prefix}double_blocks.0.img_attn.qkv.bias" in sd,
        "guidance_embed": f"{prefix}guidance_in.in_layer.weight" in sd,
    }
    told = _metadata_config(metadata)
    for name in ("axes_dim", "theta"):
        if name in told:
            config[name] = told[name]
    if "axes_dims_rope" in told:
        config["axes_dim"] = list(told["axes_dims_rope"])
    return config


# Tried in order; the first that recognises its keys decides.
_DETECTORS: list[Callable[[StateDict, str, dict[str, str] | None], dict[str, Any] | None]] = [_detect_flux]


def detect_unet_config(
    state_dict: StateDict, key_prefix: str, metadata: dict[str, str] | None = None
) -> dict[str, Any] | None:
    """Configuration of the diffusion network below `key_prefix`, or None when no family is recognised."""
    for detect in _DETECTORS:
        config = detect(state_dict, key_prefix, metadata)
        if config is not None:
            return config
    return None


def model_config_from_unet_config(unet_config: dict[str, Any], state_dict: StateDict | None = None) -> Any:
    """An instance of the first family that matches, or None."""
    for family in comfy.supported_models.models:
        if family.matches(unet_config, state_dict):
            return family(unet_config)
    logging.error("no match %s", unet_config)
    return None


def model_config_from_unet(
    state_dict: StateDict,
    unet_key_prefix: str,
    use_base_if_no_match: bool = False,
    metadata: dict[str, str] | None = None,
) -> Any:
    """The family of the network below `unet_key_prefix`, or None. `scaled_fp8` files are marked as such."""
    config = detect_unet_config(state_dict, unet_key_prefix, metadata=metadata)
    if config is None:
        return None
    model_config = model_config_from_unet_config(config, state_dict)
    if model_config is None and use_base_if_no_match:
        from comfy.supported_models_base import BASE

        model_config = BASE(config)
    marker = state_dict.pop(f"{unet_key_prefix}scaled_fp8", None)
    if model_config is not None and marker is not None:
        model_config.scaled_fp8 = torch.float8_e4m3fn if marker.dtype == torch.float32 else marker.dtype
        model_config.optimizations["fp8"] = marker.nelement() != 2
    return model_config


def unet_prefix_from_state_dict(state_dict: StateDict) -> str:
    """The commonest of the known prefixes of diffusion weights if more than five keys have it, else `model.`."""
    counts = dict.fromkeys(UNET_PREFIXES, 0)
    for key in state_dict:
        for prefix in UNET_PREFIXES:
            if key.startswith(prefix):
                counts[prefix] += 1
                break
    best = max(counts, key=lambda prefix: counts[prefix])
    return best if counts[best] > 5 else "model."


def convert_diffusers_mmdit(state_dict: StateDict, output_prefix: str = "") -> StateDict | None:
    """A transformer with diffusers' keys under ours, or None when it is not one we know."""
    if "x_embedder.weight" in state_dict and "transformer_blocks.0.attn.add_q_proj.weight" in state_dict:
        converted = from_diffusers(state_dict)
        return {output_prefix + key: value for key, value in converted.items()}
    if "x_embedder.weight" in state_dict and "single_transformer_blocks.0.attn.to_q.weight" in state_dict:
        return {output_prefix + key: value for key, value in from_diffusers(state_dict).items()}
    return None
