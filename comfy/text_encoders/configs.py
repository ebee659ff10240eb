"""What weights tell about text encoders: their names, sizes and storage formats."""

from __future__ import annotations

from typing import Any

import torch

from comfy.clip_model import clip_config_from_state_dict
from comfy.text_encoders.bert import bert_config_from_state_dict
from comfy.text_encoders.llama import language_model_config
from comfy.text_encoders.t5 import t5_config_from_state_dict

StateDict = dict[str, torch.Tensor]


def encoder_config(sd: StateDict) -> dict[str, Any] | None:
    """The configuration of one encoder from its weights, or None for kinds whose sizes are fixed."""
    if "text_model.embeddings.token_embedding.weight" in sd:
        return clip_config_from_state_dict(sd)
    if "encoder.block.0.layer.0.SelfAttention.q.weight" in sd and "shared.weight" in sd:
        return t5_config_from_state_dict(sd)
    if "bert.embeddings.word_embeddings.weight" in sd:
        return bert_config_from_state_dict(sd)
    kind = {"gemma2_2b": "gemma2_2b", "qwen25_7b": "qwen25", "llama": "llama3_8b"}.get(encoder_name(sd))
    if kind is None:
        return None
    config = language_model_config(sd, kind)
    if kind == "qwen25":
        from comfy.text_encoders.qwen_vl import vision_config

        config["vision"] = vision_config(sd)
    return config


def encoder_name(sd: StateDict) -> str:
    """The name under which image models know an encoder: "clip_l", "clip_g", "t5xxl", ..."""
    clip = sd.get("text_model.encoder.layers.0.mlp.fc1.weight")
    if clip is not None:
        for layer, name in ((30, "clip_g"), (22, "clip_h")):
            if f"text_model.encoder.layers.{layer}.mlp.fc1.weight" in sd:
                return name
        return "clip_l"
    if "bert.embeddings.word_embeddings.weight" in sd:
        return "hydit_clip"
    if "encoder.block.0.layer.0.SelfAttention.q.weight" in sd:
        return _t5_name(sd)
    gemma = "model.layers.0.post_feedforward_layernorm.weight" in sd
    if gemma and "model.layers.0.self_attn.q_norm.weight" not in sd:
        return "gemma2_2b"
    if not gemma and "model.layers.0.post_attention_layernorm.weight" in sd:
        return "qwen25_7b" if "model.layers.0.self_attn.k_proj.bias" in sd else "llama"
    return "unknown"


def _t5_name(sd: StateDict) -> str:
    width = sd["encoder.block.0.layer.0.SelfAttention.q.weight"].shape[1]
    vocabulary = sd["shared.weight"].shape[0] if "shared.weight" in sd else 0
    if width == 1472:
        return "byt5_small"
    if width == 768 and "encoder.block.0.layer.1.DenseReluDense.wi.weight" in sd:
        return "t5base"
    if vocabulary > 200000:
        return "mt5xl" if width == 2048 else "umt5xxl"
    return "pile_t5xl" if width == 2048 else "t5xxl"


def split_encoders(sd: StateDict) -> dict[str, StateDict]:
    """{encoder: its weights} of a state dict with full keys, "clip_l.transformer.text_model..."."""
    parts: dict[str, StateDict] = {}
    for key, value in sd.items():
        name, found, rest = key.partition(".transformer.")
        if found:
            parts.setdefault(name, {})[rest] = value
    return parts


def model_options_for(state_dict: StateDict | list[StateDict] | None) -> dict[str, Any]:
    """`model_options` with the configuration and the scaled-fp8 mark of every encoder in the weights."""
    if not state_dict:
        return {}
    if isinstance(state_dict, dict):
        named = split_encoders(state_dict) or {encoder_name(state_dict): state_dict}
    else:
        named = {encoder_name(sd): sd for sd in state_dict}
    options: dict[str, Any] = {}
    for name, sd in named.items():
        config = encoder_config(sd)
        if config is not None:
            options[f"{name}_model_config"] = config
        if "scaled_fp8" in sd:
            options[f"{name}_scaled_fp8"] = sd["scaled_fp8"].dtype
    return options
