"""OpenCLIP's names of text encoder weights, as checkpoints of SD 2 and SDXL have them, and transformers' names."""

from __future__ import annotations

import re

import torch

StateDict = dict[str, torch.Tensor]

_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_TOP = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_THEIRS = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)\.?(weight|bias)")
_OURS = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def from_openclip(sd: StateDict) -> StateDict:
    """OpenCLIP's text tower under transformers' keys; keys that are so already stay, other keys are left out.

    Queries, keys and values are fused there, and the projection is transposed.
    """
    out: StateDict = {}
    for key, value in sd.items():
        match = _THEIRS.fullmatch(key)
        if match is not None:
            number, part, kind = match.groups()
            layer = f"text_model.encoder.layers.{number}"
            if part == "attn.in_proj_":
                for name, piece in zip("qkv", value.chunk(3)):
                    out[f"{layer}.self_attn.{name}_proj.{kind}"] = piece
            elif part.removesuffix(".") in _LAYER:
                out[f"{layer}.{_LAYER[part.removesuffix('.')]}.{kind}"] = value
        elif key in _TOP:
            out[_TOP[key]] = value
        elif key == "text_projection":
            out["text_projection.weight"] = value.transpose(0, 1).contiguous()
        elif key.startswith(("text_model.", "text_projection.")):
            out[key] = value
    return out


def to_openclip(sd: StateDict) -> StateDict:
    """The inverse of `from_openclip`."""
    back_layer = {ours: theirs for theirs, ours in _LAYER.items()}
    back_top = {ours: theirs for theirs, ours in _TOP.items()}
    out: StateDict = {}
    fused: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in sd.items():
        match = _OURS.fullmatch(key)
        if match is not None:
            number, part, kind = match.groups()
            layer = f"transformer.resblocks.{number}"
            if part in back_layer:
                out[f"{layer}.{back_layer[part]}.{kind}"] = value
            else:
                fused.setdefault(f"{layer}.attn.in_proj_{kind}", {})[part] = value
        elif key in back_top:
            out[back_top[key]] = value
        elif key == "text_projection.weight":
            out["text_projection"] = value.transpose(0, 1).contiguous()
    for key, parts in fused.items():
        out[key] = torch.cat([parts[f"self_attn.{name}_proj"] for name in "qkv"])
    return out
