"""Convolutional parts of the UNet of latent diffusion (Rombach et al. 2022; Dhariwal & Nichol 2021, appendix A).

Pictures are [B, C, h, w] everywhere; widths are counted in latent cells.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import comfy.ops

GROUPS = 32


class TimestepBlock(nn.Module):
    """Base of layers that take the time embedding: `forward(x, emb)`."""


class Upsample(nn.Module):
    """Nearest neighbours, then a convolution where `use_conv`; to twice the size, or to the size of a skip."""

    def __init__(
        self,
        channels: int,
        use_conv: bool,
        dims: int = 2,
        out_channels: int | None = None,
        padding: int = 1,
        dtype: torch.dtype | None = None,
        device: Any = None,
        operations: Any = comfy.ops.disable_weight_init,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.dims = dims
        if use_conv:
            self.conv = operations.conv_nd(
                dims, channels, self.out_channels, 3, padding=padding, dtype=dtype, device=device
            )

    def forward(self, x: torch.Tensor, output_shape: Any = None) -> torch.Tensor:
        """x [B, C, h, w] -> [B, C_out, H, W], where (H, W) end `output_shape`, or are twice (h, w)."""
        if x.shape[1] != self.channels:
            raise ValueError(f"an upsampling layer of {self.channels} channels was given {x.shape[1]}")
        size = list(x.shape[2:])
        # Odd sizes lose half a cell on the way down, so the way up follows the skip that comes next.
        target = [2 * n for n in size] if output_shape is None else list(output_shape[2:])
        if self.dims == 3:
            target[0] = size[0]
        x = F.interpolate(x, size=target, mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Half the size, rounded up: a convolution of stride 2, or a mean of 2 x 2 cells without `use_conv`."""

    def __init__(
        self,
        channels: int,
        use_conv: bool,
        dims: int = 2,
        out_channels: int | None = None,
        padding: int = 1,
        dtype: torch.dtype | None = None,
        device: Any = None,
        operations: Any = comfy.ops.disable_weight_init,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.dims = dims
        stride: Any = 2 if dims != 3 else (1, 2, 2)
        if use_conv:
            self.op = operations.conv_nd(
                dims, channels, self.out_channels, 3, stride=stride, padding=padding, dtype=dtype, device=device
            )
        elif self.out_channels != channels:
            raise ValueError(f"a mean cannot make {self.out_channels} channels of {channels}; use a convolution")
        else:
            self.op = (nn.AvgPool2d if dims != 3 else nn.AvgPool3d)(stride, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, h, w] -> [B, C_out, h / 2, w / 2]."""
        if x.shape[1] != self.channels:
            raise ValueError(f"a downsampling layer of {self.channels} channels was given {x.shape[1]}")
        return self.op(x)


class ResBlock(TimestepBlock):
    """Two convolutions around the time embedding, plus the input (through a 1 x 1 convolution when widths differ)."""

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float = 0.0,
        out_channels: int | None = None,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        dtype: torch.dtype | None = None,
        device: Any = None,
        operations: Any = comfy.ops.disable_weight_init,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.emb_channels = emb_channels
        self.out_channels = width = out_channels or channels
        self.use_scale_shift_norm = use_scale_shift_norm
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        self.in_layers = nn.Sequential(
            operations.GroupNorm(GROUPS, channels, **place),
            nn.SiLU(),
            operations.conv_nd(dims, channels, width, 3, padding=1, **place),
        )
        emb_width = 2 * width if use_scale_shift_norm else width
        self.emb_layers = nn.Sequential(nn.SiLU(), operations.Linear(emb_channels, emb_width, **place))
        self.out_layers = nn.Sequential(
            operations.GroupNorm(GROUPS, width, **place),
            nn.SiLU(),
            nn.Dropout(p=dropout),
            operations.conv_nd(dims, width, width, 3, padding=1, **place),
        )
        self.skip_connection: nn.Module = nn.Identity()
        if width != channels:
            self.skip_connection = operations.conv_nd(dims, channels, width, 1, **place)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """x [B, C, h, w], emb [B, E] -> [B, C_out, h, w]."""
        h = self.in_layers(x)
        time = self.emb_layers(emb).to(h.dtype)
        time = time[(...,) + (None,) * (h.ndim - time.ndim)]
        if self.use_scale_shift_norm:
            norm, rest = self.out_layers[0], self.out_layers[1:]
            scale, shift = time.chunk(2, dim=1)
            h = rest(norm(h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + time)
        return self.skip_connection(x) + h
