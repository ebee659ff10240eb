"""DiffSynth's block-wise control of Qwen-Image (DiffSynth-Studio 2025): after each block the picture's tokens are changed by
what a small network makes of them and of a hint's tokens. The kinds are canny, depth and inpaint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import comfy.latent_formats
import comfy.ops
from comfy.ldm.common_dit import patches_of

_EPS = 1e-6
_LATENT_CHANNELS = 16
_PATCH = 2


class BlockWiseControlBlock(nn.Module):
    """What is added after one block."""

    def __init__(self, dim: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.x_rms = operations.RMSNorm(dim, eps=_EPS, **place)
        self.y_rms = operations.RMSNorm(dim, eps=_EPS, **place)
        self.input_proj = operations.Linear(dim, dim, **place)
        self.output_proj = operations.Linear(dim, dim, **place)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Picture tokens x [B, L, C] and hint tokens y [1 or B, L, C] -> [B, L, C]."""
        return self.output_proj(nn.functional.gelu(self.input_proj(self.x_rms(x) + self.y_rms(y))))


class QwenImageBlockWiseControlNet(nn.Module):
    """See the module. additional_in_dim: inputs of a patch beyond those of a latent: four of a mask, for inpainting."""

    def __init__(
        self, num_layers: int = 60, in_dim: int = 64, additional_in_dim: int = 0, dim: int = 3072, device: Any = None,
        dtype: Any = None, operations: Any = comfy.ops.manual_cast,
    ) -> None:  # fmt: skip
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.additional_in_dim = additional_in_dim
        self.img_in = operations.Linear(in_dim + additional_in_dim, dim, **place)
        self.controlnet_blocks = nn.ModuleList(BlockWiseControlBlock(dim, place, operations) for _ in range(num_layers))

    def process_input_latent_image(self, latent_image: torch.Tensor) -> torch.Tensor:
        """A hint's latents [n, 16 or 17, 1, h, w], as a VAE gives them, perhaps with a mask -> tokens [n, L, C]."""
        latent, mask = latent_image.split([_LATENT_CHANNELS, latent_image.shape[1] - _LATENT_CHANNELS], dim=1)
        latent = comfy.latent_formats.Wan21().process_in(latent)
        return self.img_in(patches_of(torch.cat([latent, mask], dim=1), _PATCH)[0])

    def control_block(self, img: torch.Tensor, controlnet_conditioning: torch.Tensor, block_id: int) -> torch.Tensor:
        """What is added to picture tokens [B, L, C] after block `block_id`, given the hint's [1 or B, L, C]."""
        return self.controlnet_blocks[block_id](img, controlnet_conditioning)


def sizes_of(sd: dict[str, torch.Tensor]) -> dict[str, int]:
    """The arguments of `QwenImageBlockWiseControlNet` for weights with its names."""
    dim, inputs = sd["img_in.weight"].shape
    layers = {int(key.split(".")[1]) for key in sd if key.startswith("controlnet_blocks.")}
    return {"num_layers": max(layers) + 1, "additional_in_dim": inputs - 64, "dim": dim}
