"""Adapter files -> patches of weights, and patches -> weights.

A patch is `(strength, value, strength_model, offset, function)`; `value` is an adapter, or a tuple
`("diff", (tensor, ...))`, `("set", (tensor,))` or `("model_as_lora", (tensor,))`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

import comfy.families
import comfy.weight_adapter as weight_adapter
from comfy.weight_adapter import pad_to_shape

pad_tensor_to_shape = pad_to_shape

LORA_CLIP_MAP = {
    "mlp.fc1": "mlp_fc1",
    "mlp.fc2": "mlp_fc2",
    "self_attn.k_proj": "self_attn_k_proj",
    "self_attn.q_proj": "self_attn_q_proj",
    "self_attn.v_proj": "self_attn_v_proj",
    "self_attn.out_proj": "self_attn_out_proj",
}


def load_lora(lora: dict[str, torch.Tensor], to_load: dict[str, Any], log_missing: bool = True) -> dict[Any, Any]:
    """Patches of an adapter file for the weights in `to_load` (`{key prefix in the file: target}`).

    Returns `{target: value}`. Keys that belong to no target are named in a warning.
    """
    patches: dict[Any, Any] = {}
    used: set[str] = set()
    for prefix, target in to_load.items():
        alpha = _scalar(lora, used, f"{prefix}.alpha")
        dora_scale = lora.get(f"{prefix}.dora_scale")
        if dora_scale is not None:
            used.add(f"{prefix}.dora_scale")
        for kind in weight_adapter.adapters:
            adapter = kind.load(prefix, lora, alpha, dora_scale, used)
            if adapter is not None:
                patches[target] = adapter
                used |= adapter.loaded_keys
                break
        for suffix, value_kind in (("w_norm", "diff"), ("diff", "diff"), ("set_weight", "set")):
            value = lora.get(f"{prefix}.{suffix}")
            if value is not None:
                used.add(f"{prefix}.{suffix}")
                patches[target] = (value_kind, (value,))
        for suffix in ("b_norm", "diff_b"):
            value = lora.get(f"{prefix}.{suffix}")
            if value is not None:
                used.add(f"{prefix}.{suffix}")
                name = target if isinstance(target, str) else target[0]
                bias = name.removesuffix(".weight") + ".bias"
                patches[bias if isinstance(target, str) else (bias, *target[1:])] = ("diff", (value,))
    if log_missing:
        for key in lora:
            if key not in used:
                logging.warning("lora key not loaded: %s", key)
    return patches


def _scalar(lora: dict[str, torch.Tensor], used: set[str], key: str) -> float | None:
    value = lora.get(key)
    if value is None:
        return None
    used.add(key)
    return float(value.item())


def model_lora_keys_clip(model: torch.nn.Module, key_map: dict[str, Any] | None = None) -> dict[str, Any]:
    """Add the adapter key prefixes of a text encoder's weights to `key_map`."""
    key_map = {} if key_map is None else key_map
    keys = list(model.state_dict().keys())
    families = {"clip_l", "clip_g", "clip_h"}
    has_l = any(key.startswith("clip_l.") for key in keys)
    has_g = any(key.startswith("clip_g.") for key in keys)
    for key in keys:
        if not key.endswith(".weight"):
            continue
        stem = key.removesuffix(".weight")
        key_map[f"text_encoders.{stem}"] = key
        encoder, _, path = stem.partition(".transformer.")
        if encoder in families and path.startswith("text_model.encoder.layers."):
            _clip_layer_keys(key_map, encoder, path, key, has_l)
        elif encoder in families and path == "text_projection":
            if encoder == "clip_g":
                key_map["lora_prior_te_text_projection"] = key
                key_map["lora_te2_text_projection"] = key
                key_map["text_encoder.text_projection" if not has_l else "text_encoder_2.text_projection"] = key
            else:
                key_map["lora_te1_text_projection"] = key
        elif encoder == "t5xxl":
            # Trainers number encoders; for Flux some count a CLIP-G that is not there.
            numbers = (2, 3) if has_l and not has_g else (1 + has_l + has_g,)
            key_map.update({f"lora_te{number}_{path.replace('.', '_')}": key for number in numbers})
        elif encoder == "hydit_clip":
            key_map[f"lora_te1_{path.removeprefix('bert.').replace('.', '_')}"] = key
    return key_map


def _clip_layer_keys(key_map: dict[str, Any], encoder: str, path: str, key: str, has_l: bool) -> None:
    _, _, rest = path.partition("text_model.encoder.layers.")
    layer, _, part = rest.partition(".")
    if part not in LORA_CLIP_MAP:
        return
    kohya = f"text_model_encoder_layers_{layer}_{LORA_CLIP_MAP[part]}"
    if encoder == "clip_g":
        key_map[f"lora_te2_{kohya}"] = key
        key_map[f"text_encoder_2.{path}"] = key
        if not has_l:
            key_map[f"lora_te_{kohya}"] = key
            key_map[f"text_encoder.{path}"] = key
            key_map[f"lora_prior_te_{kohya}"] = key
    else:
        key_map[f"lora_te_{kohya}"] = key
        key_map[f"lora_te1_{kohya}"] = key
        key_map[f"text_encoder.{path}"] = key


def model_lora_keys_unet(model: Any, key_map: dict[str, Any] | None = None) -> dict[str, Any]:
    """Add the adapter key prefixes of a diffusion model's weights to `key_map`.

    Values are weight names, or `(name, offset)` and `(name, None, transform)` for parts of fused weights.
    """
    key_map = {} if key_map is None else key_map
    for key in model.state_dict():
        if not key.startswith("diffusion_model."):
            continue
        if key.endswith(".weight"):
            stem = key.removesuffix(".weight")
            key_map[stem] = key
            key_map["lora_unet_" + stem.removeprefix("diffusion_model.").replace(".", "_")] = key
        else:
            key_map[key] = key
    network = getattr(model, "diffusion_model", None)
    family = comfy.families.record_of(network)
    if family is not None and family.lora_keys is not None:
        key_map.update(family.lora_keys(network))
    return key_map


def calculate_weight(
    patches: list[tuple[Any, ...]],
    weight: torch.Tensor,
    key: str,
    intermediate_dtype: torch.dtype = torch.float32,
    original_weights: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Apply patches in order to `weight` and return the result; `weight` may be changed in place."""
    for strength, value, strength_model, offset, function in patches:
        whole = weight
        if offset is not None:
            weight = weight.narrow(*offset)
        if strength_model != 1.0:
            weight = weight * strength_model
        if isinstance(value, list):
            base = value[0][1](value[0][0].to(weight.device, intermediate_dtype, copy=True), inplace=True)
            value = ("diff", (calculate_weight(value[1:], base, key, intermediate_dtype, original_weights),))
        changed = _apply(value, weight, key, strength, strength_model, offset, function, intermediate_dtype,
                         original_weights)  # fmt: skip
        if offset is None:
            weight = changed
        else:
            whole.narrow(*offset).copy_(changed)
            weight = whole
    return weight


def _apply(
    value: Any, weight: torch.Tensor, key: str, strength: float, strength_model: float,
    offset: tuple[int, int, int] | None, function: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype,
    originals: Any,
) -> torch.Tensor:  # fmt: skip
    if isinstance(value, weight_adapter.WeightAdapterBase):
        return value.calculate_weight(weight, key, strength, strength_model, offset, function, dtype, originals)
    if strength == 0.0:
        return weight
    kind, content = ("diff", value) if len(value) == 1 else (value[0], value[1])
    if kind == "set":
        return content[0].to(weight.device, weight.dtype).reshape(weight.shape).clone()
    if kind == "diff":
        change = content[0].to(weight.device, dtype)
        options = content[1] if len(content) > 1 else {}
        if options.get("pad_weight") and change.shape != weight.shape:
            weight = pad_to_shape(weight, tuple(change.shape))
        if change.shape != weight.shape:
            logging.warning("patch of %s has shape %s, not %s; it is left out", key, change.shape, weight.shape)
            return weight
        change = change if function is None else function(change)
        return weight + (strength * change).to(weight.dtype)
    if kind == "model_as_lora":
        target = content[0].to(weight.device, dtype)
        base = originals[key][0][0].to(weight.device, dtype)
        return weight + (strength * (target - base)).to(weight.dtype)
    logging.warning("patch of unknown kind %s for %s is left out", kind, key)
    return weight
