"""Small random Stable Diffusion models in the real file layouts; see `tests.tiny_models`.

Families of UNets are told by their widths, so these keep the real ones and have few blocks: about 130 MB (sd15) and
300 MB (sdxl, with KOALA's few transformers).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.text_encoders.openclip import to_openclip
from tests.tiny_models import Shapes, StateDict, clip_l_shapes, random_weights, vae_4_shapes

SD15: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [1, 1], "channel_mult": [1, 1],
    "transformer_depth": [1, 0], "transformer_depth_output": [1, 0, 0, 0], "transformer_depth_middle": -1,
    "context_dim": 768, "num_heads": 8,
}  # fmt: skip
SDXL: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [1, 1, 1], "channel_mult": [1, 1, 1],
    "transformer_depth": [0, 2, 5], "transformer_depth_output": [0, 0, 1, 0, 0, 0], "transformer_depth_middle": -2,
    "use_linear_in_transformer": True, "context_dim": 2048, "num_head_channels": 64, "num_classes": "sequential",
    "adm_in_channels": 2816,
}  # fmt: skip


def unet_shapes(config: dict[str, Any]) -> Shapes:
    """Keys and shapes of a UNet."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in UNetModel(**config).state_dict().items()}


def _half(shapes: Shapes, seed: int) -> StateDict:
    return random_weights(shapes, seed, torch.float16)


def sd15_checkpoint(seed: int = 1) -> StateDict:
    """A Stable Diffusion 1 model under the keys of an all-in-one file."""
    parts = {
        "model.diffusion_model.": _half(unet_shapes(SD15), seed),
        "cond_stage_model.transformer.": _half(clip_l_shapes(768, 1), seed + 1),
        "first_stage_model.": _half(vae_4_shapes(), seed + 2),
    }
    return {prefix + key: value for prefix, weights in parts.items() for key, value in weights.items()}


def clip_g(seed: int = 1, width: int = 1280) -> StateDict:
    """OpenCLIP bigG with one layer, under OpenCLIP's keys."""
    weights = _half({**clip_l_shapes(width, 1), "text_projection.weight": (width, width)}, seed)
    return to_openclip(weights)


def sdxl_checkpoint(seed: int = 1) -> StateDict:
    """An SDXL model (KOALA 700M) under the keys of an all-in-one file."""
    parts = {
        "model.diffusion_model.": _half(unet_shapes(SDXL), seed),
        "conditioner.embedders.0.transformer.": _half(clip_l_shapes(768, 1), seed + 1),
        "conditioner.embedders.1.model.": clip_g(seed + 2),
        "first_stage_model.": _half(vae_4_shapes(), seed + 3),
    }
    return {prefix + key: value for prefix, weights in parts.items() for key, value in weights.items()}


def sd15_lora(rank: int = 4, seed: int = 5) -> StateDict:
    """A LoRA with Kohya's keys, strong enough to change a picture plainly: a linear, a 1 x 1 and a 3 x 3 convolution."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, cols, tail in (
        ("down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_v", 320, ()),
        ("down_blocks_0_attentions_0_proj_out", 320, (1, 1)),
        ("down_blocks_0_resnets_0_conv1", 320, (3, 3)),
    ):
        ones = (1,) * len(tail)
        out[f"lora_unet_{name}.lora_down.weight"] = torch.randn((rank, cols, *tail), generator=generator) / cols**0.5
        out[f"lora_unet_{name}.lora_up.weight"] = torch.randn((320, rank, *ones), generator=generator)
        out[f"lora_unet_{name}.alpha"] = torch.tensor(float(rank))
    return out


FILES: dict[str, dict[str, Callable[[], StateDict]]] = {
    "sd15": {
        "checkpoints/tiny_sd15.safetensors": sd15_checkpoint,
        "loras/tiny_sd15_kohya.safetensors": sd15_lora,
    },
    "sdxl": {"checkpoints/tiny_sdxl.safetensors": sdxl_checkpoint},
}
