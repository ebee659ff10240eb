"""CLIP encoders with more positions than 77 (Zhang et al. 2024, Long-CLIP, has 248): recognised by their weights."""

from __future__ import annotations

from typing import Any

import torch

_POSITIONS = "text_model.embeddings.position_embedding.weight"
_LAST_LAYERS = {"clip_g": 30, "clip_l": 10}
USUAL = 77


def _positions(sd: dict[str, torch.Tensor]) -> tuple[str, int] | None:
    """The encoder in a state dict, of one encoder or of a checkpoint, and how many positions it has."""
    for name, layer in _LAST_LAYERS.items():
        for prefix in ("", f"{name}."):
            table = sd.get(prefix + _POSITIONS)
            if table is not None and (prefix or f"text_model.encoder.layers.{layer}.mlp.fc1.weight" in sd):
                return name, table.shape[0]
    return None


def model_options_long_clip(
    sd: dict[str, torch.Tensor], tokenizer_data: dict[str, Any], model_options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tokenizer data, model options) with which the tokenizer fills and the encoder has as many positions as `sd`."""
    found = _positions(sd)
    if found is None or found[1] == USUAL:
        return tokenizer_data, model_options
    name, count = found
    config = {**model_options.get(f"{name}_model_config", {}), "max_position_embeddings": count}
    return {**tokenizer_data, f"{name}_max_length": count}, {**model_options, f"{name}_model_config": config}
