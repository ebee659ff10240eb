"""The video VAE of HunyuanVideo: latent diffusion's, with convolutions over time that look back only (Tencent 2024).

Shapes: videos [B, 3, T, H, W] in -1..1, latents [B, z, t, h, w] with T = 4 (t - 1) + 1 and 8 pixels a cell and side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import comfy.ops
from comfy.ldm.modules.attention import scaled_dot_product
from comfy.ldm.modules.diffusionmodules.model import normalise
from comfy.ldm.pace import Pace

ops = comfy.ops.manual_cast


class CausalConv3d(nn.Module):
    """A convolution over [B, C, T, H, W] in which a frame sees those before it; borders and the first frame repeat."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: Any = 1) -> None:
        super().__init__()
        side = kernel // 2
        self.padding = (side, side, side, side, kernel - 1, 0)
        self.conv = ops.Conv3d(in_channels, out_channels, kernel, stride=stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, self.padding, mode="replicate") if any(self.padding) else x)


class ResnetBlock(nn.Module):
    """[B, in_channels, T, H, W] -> [B, out_channels, T, H, W]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = normalise(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = normalise(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.nin_shortcut = CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Attention of one head over all places of all frames."""

    q: nn.Module
    k: nn.Module
    v: nn.Module
    proj_out: nn.Module

    def __init__(self, channels: int, norm: nn.Module | None = None, conv: type[nn.Module] = ops.Conv3d) -> None:
        super().__init__()
        self.norm = norm or normalise(channels)
        for name in ("q", "k", "v", "proj_out"):
            setattr(self, name, conv(channels, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, (T,) H, W] -> the same. Rows come first in the order of tokens: on several ranks each has some of them."""
        h = self.norm(x)
        q, k, v = (conv(h).movedim(-2, 2) for conv in (self.q, self.k, self.v))
        sizes = q.shape[2:]
        q, k, v = (part.flatten(2).transpose(1, 2).unsqueeze(1) for part in (q, k, v))
        out = scaled_dot_product(q, k, v).squeeze(1).transpose(1, 2).unflatten(2, sizes).movedim(2, -2)
        return x + self.proj_out(out)


class Downsample(nn.Module):
    """Halve height and width, with `time` also the frames after the first."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=(2 if time else 1, 2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Double height and width, with `time` also the frames after the first."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.time = time
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        larger = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
        if self.time:
            larger = torch.cat((larger[:, :, :1], larger[:, :, 1:].repeat_interleave(2, dim=2)), dim=2)
        return self.conv(larger)


class _Stage(nn.Module):
    """The blocks of one resolution and the change to the next."""

    def __init__(self, blocks: Sequence[ResnetBlock], name: str, change: nn.Module | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.change = name if change is not None else None
        if change is not None:
            setattr(self, name, change)

    def parts(self) -> list[nn.Module]:
        """The blocks in order."""
        return [*self.block, *([getattr(self, self.change)] if self.change else [])]


class _Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)


class _Coder(nn.Module):
    """What the encoder and the decoder have in common: their layers one after the other."""

    conv_in: nn.Module
    norm_out: nn.Module
    conv_out: nn.Module
    mid: _Middle

    def _through(self, parts: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
        """All layers; between them a cancelled prompt ends."""
        pace = Pace(True)
        for part in parts:
            x = part(x)
            pace.step(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Encoder(_Coder):
    """Video -> moments [B, 2z, t, h, w]."""

    def __init__(
        self, *, ch: int, ch_mult: Sequence[int], num_res_blocks: int, in_channels: int, z_channels: int,
        double_z: bool = True, time_compress: int = 4, **ignored: object,
    ) -> None:  # fmt: skip
        super().__init__()
        widths = [ch * m for m in (ch_mult[0], *ch_mult)]
        widths[0] = ch
        levels, temporal = len(ch_mult), time_compress.bit_length() - 1
        self.conv_in = CausalConv3d(in_channels, ch)
        stages = []
        for level, (width, out) in enumerate(zip(widths, widths[1:])):
            blocks = [ResnetBlock(width if j == 0 else out, out) for j in range(num_res_blocks)]
            last = level == levels - 1
            stages.append(
                _Stage(blocks, "downsample", None if last else Downsample(out, level >= levels - 1 - temporal))
            )
        self.down = nn.ModuleList(stages)
        self.mid = _Middle(widths[-1])
        self.norm_out = normalise(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * z_channels if double_z else z_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stages: Any = self.down
        parts = [part for stage in stages for part in stage.parts()]
        return self._through((self.conv_in, *parts, self.mid.block_1, self.mid.attn_1, self.mid.block_2), x)


class Decoder(_Coder):
    """Latent [B, z, t, h, w] -> video."""

    def __init__(
        self, *, ch: int, out_ch: int, ch_mult: Sequence[int], num_res_blocks: int, z_channels: int,
        time_compress: int = 4, **ignored: object,
    ) -> None:  # fmt: skip
        super().__init__()
        levels, temporal = len(ch_mult), time_compress.bit_length() - 1
        width = ch * ch_mult[-1]
        self.conv_in = CausalConv3d(z_channels, width)
        self.mid = _Middle(width)
        stages = []
        for level in reversed(range(levels)):
            out = ch * ch_mult[level]
            blocks = [ResnetBlock(width if j == 0 else out, out) for j in range(num_res_blocks + 1)]
            stages.append(_Stage(blocks, "upsample", Upsample(out, level <= temporal) if level else None))
            width = out
        self.up = nn.ModuleList(reversed(stages))  # numbered from the pixels' side, as in the files
        self.norm_out = normalise(width)
        self.conv_out = CausalConv3d(width, out_ch)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        stages: Any = self.up
        parts = [part for stage in reversed(stages) for part in stage.parts()]
        return self._through((self.conv_in, self.mid.block_1, self.mid.attn_1, self.mid.block_2, *parts), z)


class HunyuanVideoVAE(nn.Module):
    """The autoencoder; `encode` gives the mean."""

    def __init__(self, ddconfig: dict[str, Any], embed_dim: int | None = None) -> None:
        super().__init__()
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        z = ddconfig["z_channels"]
        self.quant_conv = ops.Conv3d(2 * z, 2 * (embed_dim or z), 1)
        self.post_quant_conv = ops.Conv3d(embed_dim or z, z, 1)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Video [B, 3, T, H, W] -> mean latent."""
        return self.quant_conv(self.encoder(x)).chunk(2, dim=1)[0]

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latent [B, z, t, h, w] -> video."""
        return self.decoder(self.post_quant_conv(z))


def config_from_state_dict(sd: dict[str, torch.Tensor]) -> dict[str, Any] | None:
    """The `ddconfig` of these weights, or None when they are of another VAE."""
    first, latent = sd.get("encoder.conv_in.conv.weight"), sd.get("decoder.conv_in.conv.weight")
    if first is None or latent is None or "decoder.mid.attn_1.q.weight" not in sd or "quant_conv.weight" not in sd:
        return None
    mult: list[int] = []
    blocks = 0
    while f"encoder.down.{len(mult)}.block.0.conv1.conv.weight" in sd:
        mult.append(sd[f"encoder.down.{len(mult)}.block.0.conv1.conv.weight"].shape[0] // first.shape[0])
    while f"encoder.down.0.block.{blocks}.conv1.conv.weight" in sd:
        blocks += 1
    return {
        "ch": first.shape[0], "in_channels": first.shape[1], "ch_mult": mult, "num_res_blocks": blocks,
        "z_channels": latent.shape[1], "out_ch": sd["decoder.conv_out.conv.weight"].shape[0], "time_compress": 4,
    }  # fmt: skip
