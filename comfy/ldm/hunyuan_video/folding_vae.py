"""The VAEs of HunyuanImage 2.1 (Tencent 2025): that of the base model for pictures, that of its refiner for videos.

Between resolutions cells of places are folded into channels by a convolution, beside a shortcut without weights: means or
copies of channels (Chen et al. 2024, arXiv 2410.10733). Over time convolutions look back only. Frames are coded in pieces:
the first one alone, then a piece for each latent frame, with the last frames of the piece before in a cache. Norms see
one place each, so that the pieces give what the whole clip would, but for the middle, which sees the whole latent.
Shapes: pictures [B, 3, H, W] in -1..1 and latents [B, z, h, w]; or videos [B, 3, T, H, W] and [B, z, t, h, w].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import comfy.ops
from comfy.ldm.hunyuan_video.vae import AttnBlock
from comfy.ldm.modules.cells import cells_of, from_cells
from comfy.ldm.modules.diffusionmodules.model import normalise
from comfy.ldm.pace import LONG_CELLS, Pace
from comfy.ldm.wan.vae import RMS_norm

ops = comfy.ops.manual_cast
StateDict = Mapping[str, torch.Tensor]
Cache = dict[nn.Module, torch.Tensor]
"""By layer the last frames that it has seen; a layer that is in it has seen the first frame."""
PIECE = 4
"""Frames of the video for each latent frame after the first."""
_LOOKS_BACK = 2


class CausalConv3d(nn.Module):
    """A convolution of 3 x 3 x 3 places in which a frame sees those before it; borders and the first frame repeat."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = ops.Conv3d(in_channels, out_channels, 3)

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        before = cache.get(self)
        seen = torch.cat([x[:, :, :1]] * _LOOKS_BACK + [x] if before is None else [before, x], dim=2)
        cache[self] = seen[:, :, -_LOOKS_BACK:].clone()
        return self.conv(F.pad(seen, (1, 1, 1, 1, 0, 0), mode="replicate"))


class Conv2d(ops.Conv2d):
    """A convolution of 3 x 3 places."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x)


def _conv(video: bool, in_channels: int, out_channels: int) -> nn.Module:
    return CausalConv3d(in_channels, out_channels) if video else Conv2d(in_channels, out_channels)


def _norm(video: bool, channels: int) -> nn.Module:
    return RMS_norm(channels) if video else normalise(channels)


class ResnetBlock(nn.Module):
    """[B, C, ...] -> [B, C, ...]."""

    def __init__(self, video: bool, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (_norm(video, channels) for _ in range(2))
        self.conv1, self.conv2 = (_conv(video, channels, channels) for _ in range(2))

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)), cache)
        return x + self.conv2(F.silu(self.norm2(h)), cache)


class _Attention(AttnBlock):
    def __init__(self, video: bool, channels: int) -> None:
        super().__init__(channels, _norm(video, channels), ops.Conv3d if video else ops.Conv2d)

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x)


def fold(x: torch.Tensor, time: int) -> torch.Tensor:
    """[B, C, T, H, W] -> [B, cells * C, T / time, H / 2, W / 2]: places of a cell become channels, the place first."""
    return cells_of(x, time, 2).permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(1, 4)


def unfold(x: torch.Tensor, time: int) -> torch.Tensor:
    """The reverse of `fold`."""
    return from_cells(x.unflatten(1, (time, 2, 2, -1)).permute(0, 4, 1, 2, 3, 5, 6, 7))


def _means(x: torch.Tensor, channels: int) -> torch.Tensor:
    """Means of neighbouring channels [B, C, ...] in as many groups as `channels`."""
    return x.unflatten(1, (channels, -1)).mean(dim=2)


class Downsample(nn.Module):
    """Half the rows and columns, with `time` also the frames after the first, which is folded by itself."""

    def __init__(self, video: bool, channels: int, out_channels: int, time: bool) -> None:
        super().__init__()
        self.time, self.out_channels = 2 if time else 1, out_channels
        self.conv = _conv(video, channels, out_channels // (4 * self.time))

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        if x.ndim == 4:
            return self._folded(self.conv(x, cache).unsqueeze(2), x.unsqueeze(2)).squeeze(2)
        first = self.time == 2 and self not in cache
        cache[self] = x[:, :, :0]
        h = self.conv(x, cache)
        if not first:
            return self._folded(h, x)
        start = torch.cat([fold(h[:, :, :1], 1)] * 2, dim=1) + _means(fold(x[:, :, :1], 1), self.out_channels)
        return start if x.shape[2] == 1 else torch.cat((start, self._folded(h[:, :, 1:], x[:, :, 1:])), dim=2)

    def _folded(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return fold(h, self.time) + _means(fold(x, self.time), self.out_channels)


class Upsample(nn.Module):
    """Twice the rows and columns, with `time` also the frames after the first, which is unfolded by itself."""

    def __init__(self, video: bool, channels: int, out_channels: int, time: bool) -> None:
        super().__init__()
        self.time = 2 if time else 1
        made = 4 * self.time * out_channels
        self.out_channels, self.repeats = out_channels, made // channels
        self.conv = _conv(video, channels, made)

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        if x.ndim == 4:
            return self._unfolded(self.conv(x, cache).unsqueeze(2), x.unsqueeze(2)).squeeze(2)
        first = self.time == 2 and self not in cache
        cache[self] = x[:, :, :0]
        h = self.conv(x, cache)
        if not first:
            return self._unfolded(h, x)
        start = unfold(h[:, :, :1], 1)[:, : self.out_channels]
        start = start + unfold(x[:, :, :1].repeat_interleave(self.repeats // 2, dim=1), 1)
        return start if x.shape[2] == 1 else torch.cat((start, self._unfolded(h[:, :, 1:], x[:, :, 1:])), dim=2)

    def _unfolded(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return unfold(h, self.time) + unfold(x.repeat_interleave(self.repeats, dim=1), self.time)


class _Middle(nn.Module):
    def __init__(self, video: bool, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(video, channels)
        self.attn_1 = _Attention(video, channels)
        self.block_2 = ResnetBlock(video, channels)

    def parts(self) -> list[nn.Module]:
        """The blocks in order."""
        return [self.block_1, self.attn_1, self.block_2]


class _Stage(nn.Module):
    """The blocks of one resolution and the change to the next, if there is one."""

    def __init__(self, blocks: Iterable[nn.Module], name: str, change: nn.Module | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.change = name if change is not None else None
        if change is not None:
            setattr(self, name, change)

    def parts(self) -> list[nn.Module]:
        """The blocks in order."""
        return [*self.block, *([getattr(self, self.change)] if self.change else [])]


class _Coder(nn.Module):
    """What the encoder and the decoder have in common."""

    norm_out: nn.Module
    conv_out: nn.Module

    @staticmethod
    def _through(parts: Iterable[nn.Module], x: torch.Tensor, cache: Cache) -> torch.Tensor:
        """`parts` one after the other; between them a cancelled prompt ends."""
        pace = Pace(x.ndim == 5 or x.shape[0] * x.shape[2] * x.shape[3] >= LONG_CELLS)
        for part in parts:
            x = part(x, cache)
            pace.step(x)
        return x

    def _out(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        return self.conv_out(F.silu(self.norm_out(x)), cache)


def _stages(side: nn.ModuleList) -> list[nn.Module]:
    stages: Any = side
    return [part for stage in stages for part in stage.parts()]


class Encoder(_Coder):
    """Picture or video -> moments [B, 2z, ...]."""

    def __init__(self, video: bool, channels: int, z: int, widths: Sequence[int], blocks: int, times: Sequence[bool]):
        super().__init__()
        self.moments = 2 * z
        self.conv_in = _conv(video, channels, widths[0])
        stages = []
        for i, width in enumerate(widths):
            layers = [ResnetBlock(video, width) for _ in range(blocks)]
            change = Downsample(video, width, widths[i + 1], times[i]) if i + 1 < len(widths) else None
            stages.append(_Stage(layers, "downsample", change))
        self.down = nn.ModuleList(stages)
        self.mid = _Middle(video, widths[-1])
        self.norm_out = _norm(video, widths[-1])
        self.conv_out = _conv(video, widths[-1], self.moments)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts, cache = [self.conv_in, *_stages(self.down)], Cache()
        if x.ndim == 5:
            bounds = [0, *range(1, x.shape[2] + 1, PIECE)]
            pieces = [self._through(parts, x[:, :, a:b], cache) for a, b in zip(bounds, bounds[1:])]
            x = torch.cat(pieces, dim=2)
        else:
            x = self._through(parts, x, cache)
        x = self._through(self.mid.parts(), x, {})
        return self._out(x, {}) + _means(x, self.moments)


class Decoder(_Coder):
    """Latent [B, z, ...] -> picture or video."""

    def __init__(self, video: bool, channels: int, z: int, widths: Sequence[int], blocks: int, times: Sequence[bool]):
        super().__init__()
        self.copies = widths[0] // z
        self.conv_in = _conv(video, z, widths[0])
        self.mid = _Middle(video, widths[0])
        stages = []
        for i, width in enumerate(widths):  # numbered from the latent's side, as in the files
            layers = [ResnetBlock(video, width) for _ in range(blocks + 1)]
            change = Upsample(video, width, widths[i + 1], times[i]) if i + 1 < len(widths) else None
            stages.append(_Stage(layers, "upsample", change))
        self.up = nn.ModuleList(stages)
        self.norm_out = _norm(video, widths[-1])
        self.conv_out = _conv(video, widths[-1], channels)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(z, {}) + z.repeat_interleave(self.copies, dim=1)
        x = self._through(self.mid.parts(), x, {})
        parts, cache = _stages(self.up), Cache()
        pieces = x.split(1, dim=2) if x.ndim == 5 else [x]
        made = [self._out(self._through(parts, piece, cache), cache) for piece in pieces]
        return torch.cat(made, dim=2) if len(made) > 1 else made[0]


class FoldingVAE(nn.Module):
    """The autoencoder; `encode` gives the mean. `config`: what `config_from_state_dict` returns.

    Latents of videos, [B, 2z, f, h, w], are pairs of latent frames, the first of which is doubled.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.video, channels, z = config["video"], config["channels"], config["z"]
        self.encoder = Encoder(self.video, channels, z, config["down"], config["blocks"], config["down_times"])
        self.decoder = Decoder(self.video, channels, z, config["up"], config["blocks"], config["up_times"])

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 3, H, W], or videos [B, 3, 8 k + 1, H, W], -> mean latents.

        Raises ValueError for another number of frames.
        """
        if self.video and (x.shape[2] - 1) % (2 * PIECE):
            raise ValueError(f"the refiner's VAE encodes 1, 9, 17, ... frames, not {x.shape[2]}; cut the video")
        mean = self.encoder(x).chunk(2, dim=1)[0]
        if not self.video:
            return mean
        pairs = torch.cat((mean[:, :, :1], mean), dim=2).unflatten(2, (-1, 2))
        return pairs.permute(0, 3, 1, 2, 4, 5).flatten(1, 2)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents -> pictures or videos."""
        if self.video:
            pairs = z.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5)
            z = pairs.flatten(2, 3)[:, :, 1:]
        return self.decoder(z)


def _levels(sd: StateDict, side: str, change: str, suffix: str) -> tuple[list[int], list[bool]]:
    """Widths of the levels, and which changes between them go over time."""
    widths: list[int] = []
    while f"{side}.{len(widths)}.block.0.conv1{suffix}" in sd:
        widths.append(sd[f"{side}.{len(widths)}.block.0.conv1{suffix}"].shape[1])
    times = []
    for i, following in enumerate(widths[1:]):
        made = sd[f"{side}.{i}.{change}.conv{suffix}"].shape[0]
        times.append(following // made == 8 if change == "downsample" else made // following == 8)
    return widths, times


def config_from_state_dict(sd: StateDict) -> dict[str, Any] | None:
    """The argument of `FoldingVAE` for these weights, or None when they are of another VAE."""
    video = "decoder.up.0.upsample.conv.conv.weight" in sd and "decoder.norm_out.gamma" in sd
    suffix = ".conv.weight" if video else ".weight"
    first, latent = sd.get(f"encoder.conv_in{suffix}"), sd.get(f"decoder.conv_in{suffix}")
    # Other VAEs of pictures number their upsamplings from the pixels' side: their level 0 has none.
    if first is None or latent is None or f"decoder.up.0.upsample.conv{suffix}" not in sd:
        return None
    down, down_times = _levels(sd, "encoder.down", "downsample", suffix)
    up, up_times = _levels(sd, "decoder.up", "upsample", suffix)
    blocks = 0
    while f"encoder.down.0.block.{blocks}.conv1{suffix}" in sd:
        blocks += 1
    return {
        "video": video, "channels": first.shape[1], "z": latent.shape[1], "blocks": blocks, "down": down, "up": up,
        "down_times": down_times, "up_times": up_times,
    }  # fmt: skip
