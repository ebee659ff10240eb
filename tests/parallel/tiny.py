"""Tiny random networks for parallel tests, the same on every rank."""

from __future__ import annotations

import torch

from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from tests.tiny_models import weight_from

CONFIG = {
    "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 24, "context_in_dim": 40, "hidden_size": 96,
    "mlp_ratio": 4.0, "num_heads": 4, "depth": 2, "depth_single_blocks": 3, "axes_dim": [4, 10, 10], "theta": 10000,
    "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip


def tiny_flux(seed: int = 0, **changes: object) -> Flux:
    """A Flux network with random weights of moderate size, in fp32."""
    network = Flux(**{**CONFIG, **changes})
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(".scale"):
            value = 1 + 0.1 * noise
        elif parameter.ndim < 2:
            value = 0.02 * noise
        else:
            value = noise / parameter.shape[1] ** 0.5
        parameter.data.copy_(value)
    return network.eval().requires_grad_(False)


def inputs(height: int, width: int, text: int, batch: int = 1, seed: int = 1) -> dict[str, torch.Tensor]:
    """Arguments of a call on latents of `height` x `width` with `text` prompt tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "x": draw(batch, 16, height, width),
        "timestep": torch.linspace(0.3, 0.9, batch),
        "context": draw(batch, text, 40),
        "y": draw(batch, 24),
        "guidance": torch.full((batch,), 3.5),
    }


UNET = {
    "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1], "channel_mult": [1, 2],
    "transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 0, 1], "transformer_depth_middle": 1,
    "context_dim": 24, "num_head_channels": 32, "num_classes": "sequential", "adm_in_channels": 48,
}  # fmt: skip


def tiny_unet(seed: int = 0, **changes: object) -> UNetModel:
    """A UNet with random weights of moderate size, in fp32."""
    network = UNetModel(**{**UNET, **changes})
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        parameter.data.copy_(weight_from(name, torch.randn(parameter.shape, generator=generator)))
    return network.eval().requires_grad_(False)
