"""The networks of `benchmarks.families` in diffusers: true sizes, random weights, the same call.

Configurations are those of the published `config.json` files. Each function returns a network and the keyword arguments of
a call with `prompts` conditionings. Attention runs on cuDNN's kernel, as ours does on Hopper GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Made = tuple[type[torch.nn.Module], dict[str, Any], dict[str, Any]]


class Inputs:
    """Makes the tensors of a call. scale: latents so many times smaller each way."""

    def __init__(self, device: torch.device, dtype: torch.dtype, prompts: int, scale: int) -> None:
        self.device, self.dtype, self.prompts, self.scale = device, dtype, prompts, scale

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(self.prompts, *shape, device=self.device, dtype=self.dtype)

    @property
    def times(self) -> torch.Tensor:
        """One time for each prompt."""
        return torch.full((self.prompts,), 700.0, device=self.device, dtype=self.dtype)


def _sdxl(make: Inputs) -> Made:
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }  # fmt: skip
    side = 128 // make.scale
    return UNet2DConditionModel, config, {
        "sample": make(4, side, side), "timestep": make.times, "encoder_hidden_states": make(77, 2048),
        "added_cond_kwargs": {"text_embeds": make(1280), "time_ids": make(6).abs() * 1000},
    }  # fmt: skip


def _sd35_large(make: Inputs) -> Made:
    from diffusers import SD3Transformer2DModel

    config = {
        "sample_size": 128, "num_layers": 38, "num_attention_heads": 38, "attention_head_dim": 64,
        "joint_attention_dim": 4096, "caption_projection_dim": 2432, "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192, "qk_norm": "rms_norm",
    }  # fmt: skip
    side = 128 // make.scale
    return SD3Transformer2DModel, config, {
        "hidden_states": make(16, side, side), "timestep": make.times, "encoder_hidden_states": make(154, 4096),
        "pooled_projections": make(2048),
    }  # fmt: skip


def _pixart_sigma(make: Inputs) -> Made:
    from diffusers import PixArtTransformer2DModel

    config = {"caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": False}
    side = 128 // make.scale
    return PixArtTransformer2DModel, config, {
        "hidden_states": make(4, side, side), "timestep": make.times, "encoder_hidden_states": make(300, 4096),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def _hunyuan_dit(make: Inputs) -> Made:
    from diffusers import HunyuanDiT2DModel

    side = 128 // make.scale
    config = {
        "in_channels": 4, "patch_size": 2, "sample_size": side, "hidden_size": 1408, "num_layers": 40,
        "mlp_ratio": 4.3637, "use_style_cond_and_image_meta_size": False,
    }  # fmt: skip
    angles = torch.randn((side // 2) ** 2, 88, device=make.device)
    return HunyuanDiT2DModel, config, {
        "hidden_states": make(4, side, side), "timestep": make.times, "encoder_hidden_states": make(77, 1024),
        "text_embedding_mask": torch.ones(make.prompts, 77, device=make.device, dtype=torch.long),
        "encoder_hidden_states_t5": make(256, 2048),
        "text_embedding_mask_t5": torch.ones(make.prompts, 256, device=make.device, dtype=torch.long),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }  # fmt: skip


def _qwen_image(make: Inputs) -> Made:
    from diffusers import QwenImageTransformer2DModel

    side = 64 // make.scale
    return QwenImageTransformer2DModel, {}, {
        "hidden_states": make(side * side, 64), "timestep": make.times / 1000, "encoder_hidden_states": make(200, 3584),
        "encoder_hidden_states_mask": torch.ones(make.prompts, 200, device=make.device, dtype=torch.bool),
        "img_shapes": [[(1, side, side)]] * make.prompts,
    }  # fmt: skip


def _wan_14b(make: Inputs) -> Made:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel, {}, {
        "hidden_states": make(16, 9, 60 // make.scale, 104 // make.scale), "timestep": make.times,
        "encoder_hidden_states": make(512, 4096),
    }  # fmt: skip


NETWORKS: dict[str, Callable[[Inputs], Made]] = {
    "sdxl": _sdxl, "sd35_large": _sd35_large, "pixart_sigma": _pixart_sigma, "hunyuan_dit": _hunyuan_dit,
    "qwen_image": _qwen_image, "wan_14b": _wan_14b,
}  # fmt: skip


def call_of(
    name: str, device: torch.device, dtype: torch.dtype, prompts: int, scale: int, compiled: bool,
    randomise: Callable[[torch.nn.Module], None],
) -> tuple[Callable[[], torch.Tensor], int]:  # fmt: skip
    """A call of diffusers' network, and the number of its parameters.

    compiled: its repeated blocks go through torch.compile, as its documentation recommends; otherwise it runs as it is.
    """
    kind, config, inputs = NETWORKS[name](Inputs(device, dtype, prompts, scale))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # so that the weights are never there in fp32
    try:
        with torch.device(device):
            network: Any = kind(**config)
    finally:
        torch.set_default_dtype(before)
    randomise(network)
    if device.type == "cuda" and hasattr(network, "set_attention_backend"):
        network.set_attention_backend("_native_cudnn")
    if compiled:
        network.compile_repeated_blocks(fullgraph=True)

    def call() -> torch.Tensor:
        out: torch.Tensor = network(**inputs, return_dict=False)[0]
        return out

    return call, sum(p.numel() for p in network.parameters())
