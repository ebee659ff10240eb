"""Convolutions over time of LTX-Video's VAE."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import comfy.ops


class CausalConv3d(nn.Module):
    """A convolution over [B, C, T, H, W]; before the first frame it is repeated, and not causal also after the last."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: Any = 1,
        spatial_padding_mode: str = "zeros",
    ) -> None:  # fmt: skip
        super().__init__()
        self.time_kernel_size = kernel_size
        side = kernel_size // 2
        self.conv = comfy.ops.manual_cast.Conv3d(
            in_channels, out_channels, kernel_size, stride, (0, side, side), padding_mode=spatial_padding_mode
        )

    def forward(self, x: torch.Tensor, causal: bool = True) -> torch.Tensor:
        """With `causal` a frame of the output depends on no later frame of the input."""
        more = self.time_kernel_size - 1
        after = 0 if causal else more // 2
        return self.conv(torch.cat([x[:, :, :1]] * (more - after) + [x] + [x[:, :, -1:]] * after, dim=2))
