"""The difference of two models as a LoRA file."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io
from comfy_nodes.v3 import extension

CLAMP_QUANTILE = 0.99
# quantile() takes no more numbers than this
MOST_NUMBERS = 1 << 24


def extract_lora(difference: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(up, down) of the best approximation of a weight [out, in, ...] of this rank, outliers cut off."""
    matrix = difference.float().flatten(1)
    rank = min(rank, *matrix.shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    up, down = left[:, :rank] * values[:rank], right[:rank]
    numbers = torch.cat([up.flatten(), down.flatten()])
    stride = -(-numbers.numel() // MOST_NUMBERS)
    limit = float(torch.quantile(numbers[::stride], CLAMP_QUANTILE))
    up, down = up.clamp(-limit, limit), down.clamp(-limit, limit)
    if difference.ndim > 2:
        up = up.reshape(*up.shape, *[1] * (difference.ndim - 2))
        down = down.reshape(rank, *difference.shape[1:])
    return up, down


def lora_of(patcher: Any, prefix: str, new_prefix: str, rank: int, full: bool, bias: bool) -> dict[str, torch.Tensor]:
    """Adapter weights for a model that holds differences (of a subtraction, for instance)."""
    comfy.model_management.load_models_gpu([patcher], force_patch_weights=True)
    out: dict[str, torch.Tensor] = {}
    for key, weight in patcher.model_state_dict(filter_prefix=prefix).items():
        stem, _, kind = key.removeprefix(prefix).rpartition(".")
        name = f"{new_prefix}{stem}"
        if kind == "bias" and bias:
            out[f"{name}.diff_b"] = weight
        elif kind == "weight" and (full or (weight.ndim < 2 and bias)):
            out[f"{name}.diff"] = weight
        elif kind == "weight" and weight.ndim >= 2:
            try:
                up, down = extract_lora(weight, rank)
            except torch.linalg.LinAlgError:
                logging.warning("%s is left out: its difference cannot be decomposed; is it zero?", key)
                continue
            out[f"{name}.lora_up.weight"], out[f"{name}.lora_down.weight"] = up, down
    return {key: value.half().contiguous().cpu() for key, value in out.items()}


class LoraSave(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoraSave",
            display_name="Extract and Save Lora",
            category="_for_testing",
            is_experimental=True,
            is_output_node=True,
            inputs=[
                io.String.Input("filename_prefix", default="loras/ComfyUI_extracted_lora", multiline=False),
                io.Int.Input("rank", default=8, min=1, max=4096, step=1),
                io.Combo.Input("lora_type", options=["standard", "full_diff"]),
                io.Boolean.Input("bias_diff", default=True),
                io.Model.Input("model_diff", optional=True, tooltip="Of ModelMergeSubtract."),
                io.Clip.Input("text_encoder_diff", optional=True, tooltip="Of CLIPMergeSubtract."),
            ],
            outputs=[],
        )

    @classmethod
    def execute(
        cls,
        filename_prefix: str,
        rank: int,
        lora_type: str,
        bias_diff: bool,
        model_diff: Any = None,
        text_encoder_diff: Any = None,
    ):
        if model_diff is None and text_encoder_diff is None:
            return io.NodeOutput()
        folder, name, counter, _, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        options = (rank, lora_type == "full_diff", bias_diff)
        weights: dict[str, torch.Tensor] = {}
        if model_diff is not None:
            weights.update(lora_of(model_diff, "diffusion_model.", "diffusion_model.", *options))
        if text_encoder_diff is not None:
            weights.update(lora_of(text_encoder_diff.patcher, "", "text_encoders.", *options))
        comfy.utils.save_torch_file(weights, os.path.join(folder, f"{name}_{counter:05}_.safetensors"))
        return io.NodeOutput()

    save = execute


comfy_entrypoint = extension(LoraSave)
