"""Encoder and decoder of the image VAE of latent diffusion (Rombach et al. 2022, appendix G)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import comfy.ops
from comfy.ldm.modules.attention import scaled_dot_product
from comfy.ldm.pace import LONG_CELLS, Pace

ops = comfy.ops.manual_cast


def normalise(channels: int) -> nn.Module:
    """Group norm over 32 groups."""
    return ops.GroupNorm(num_groups=32, num_channels=channels, eps=1e-6, affine=True)


class ResnetBlock(nn.Module):
    """[B, in_channels, H, W] -> [B, out_channels, H, W]."""

    def __init__(self, *, in_channels: int, out_channels: int | None = None) -> None:
        super().__init__()
        out_channels = out_channels or in_channels
        self.norm1 = normalise(in_channels)
        self.conv1 = ops.Conv2d(in_channels, out_channels, kernel_size=3, stride=1, padding=1)
        self.norm2 = normalise(out_channels)
        self.conv2 = ops.Conv2d(out_channels, out_channels, kernel_size=3, stride=1, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = ops.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return x + h


def map_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of one head over all places of maps [B, C, H, W]."""
    rows = (x.flatten(2).transpose(1, 2).unsqueeze(1) for x in (q, k, v))
    return scaled_dot_product(*rows).squeeze(1).transpose(1, 2).reshape(v.shape)


def vae_attention() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The attention of VAEs, for packs whose VAEs are built of the parts of this module."""
    return map_attention


class AttnBlock(nn.Module):
    """Attention of one head over all places of the map."""

    q: nn.Module
    k: nn.Module
    v: nn.Module
    proj_out: nn.Module

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.norm = normalise(in_channels)
        self.optimized_attention = vae_attention()
        for name in ("q", "k", "v", "proj_out"):
            setattr(self, name, ops.Conv2d(in_channels, in_channels, kernel_size=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.proj_out(self.optimized_attention(self.q(h), self.k(h), self.v(h)))


class Downsample(nn.Module):
    """Halve height and width; the border is padded right and below only."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv = ops.Conv2d(in_channels, in_channels, kernel_size=3, stride=2, padding=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv = ops.Conv2d(in_channels, in_channels, kernel_size=3, stride=1, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _middle(channels: int) -> nn.Module:
    mid: Any = nn.Module()
    mid.block_1 = ResnetBlock(in_channels=channels)
    mid.attn_1 = AttnBlock(channels)
    mid.block_2 = ResnetBlock(in_channels=channels)
    return mid


def _middle_parts(mid: Any) -> list[nn.Module]:
    return [mid.block_1, mid.attn_1, mid.block_2]


def _through(pace: Pace, parts: Iterable[nn.Module], h: torch.Tensor) -> torch.Tensor:
    """`parts` one after the other; between them a cancelled prompt ends."""
    for part in parts:
        h = part(h)
        pace.step(h)
    return h


class Encoder(nn.Module):
    """Picture [B, in_channels, H, W] -> moments [B, 2 * z_channels, H / f, W / f]."""

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        in_channels: int,
        z_channels: int,
        double_z: bool = True,
        **ignored: object,
    ) -> None:
        super().__init__()
        self.conv_in = ops.Conv2d(in_channels, ch, kernel_size=3, stride=1, padding=1)
        self.down = nn.ModuleList()
        last = ch
        for level, mult in enumerate(ch_mult):
            stage: Any = nn.Module()
            stage.block = nn.ModuleList()
            stage.attn = nn.ModuleList()
            for _ in range(num_res_blocks):
                stage.block.append(ResnetBlock(in_channels=last, out_channels=ch * mult))
                last = ch * mult
            if level < len(ch_mult) - 1:
                stage.downsample = Downsample(last)
            self.down.append(stage)
        self.mid = _middle(last)
        self.norm_out = normalise(last)
        self.conv_out = ops.Conv2d(last, 2 * z_channels if double_z else z_channels, kernel_size=3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts: list[nn.Module] = [self.conv_in]
        stage: Any
        for stage in self.down:
            parts += [*stage.block, *([stage.downsample] if hasattr(stage, "downsample") else [])]
        h = _through(
            Pace(x.shape[0] * x.shape[2] * x.shape[3] >= 64 * LONG_CELLS), [*parts, *_middle_parts(self.mid)], x
        )
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latent [B, z_channels, h, w] -> picture [B, out_ch, h * f, w * f]."""

    def __init__(
        self, *, ch: int, out_ch: int, ch_mult: Sequence[int], num_res_blocks: int, z_channels: int, **ignored: object
    ) -> None:
        super().__init__()
        last = ch * ch_mult[-1]
        self.conv_in = ops.Conv2d(z_channels, last, kernel_size=3, stride=1, padding=1)
        self.mid = _middle(last)
        stages = []
        for level in reversed(range(len(ch_mult))):
            stage: Any = nn.Module()
            stage.block = nn.ModuleList()
            stage.attn = nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                stage.block.append(ResnetBlock(in_channels=last, out_channels=ch * ch_mult[level]))
                last = ch * ch_mult[level]
            if level > 0:
                stage.upsample = Upsample(last)
            stages.append(stage)
        self.up = nn.ModuleList(reversed(stages))  # numbered from the picture's side, as in the files
        self.norm_out = normalise(last)
        self.conv_out = ops.Conv2d(last, out_ch, kernel_size=3, stride=1, padding=1)

    def forward(self, z: torch.Tensor, **kwargs: object) -> torch.Tensor:
        parts: list[nn.Module] = [self.conv_in, *_middle_parts(self.mid)]
        stage: Any
        for stage in reversed(self.up):
            parts += [*stage.block, *([stage.upsample] if hasattr(stage, "upsample") else [])]
        h = _through(Pace(z.shape[0] * z.shape[2] * z.shape[3] >= LONG_CELLS), parts, z)
        return self.conv_out(F.silu(self.norm_out(h)))
