"""The video VAEs of Wan 2.1 (also Qwen-Image's) and Wan 2.2 5B: causal convolutions over time (Wan Team 2025).

Frames are coded in pieces: the first one alone, then a piece for each latent frame. Each convolution over time keeps the
last frames of the piece before in a cache, so that the pieces give what the whole clip would, in bounded memory.
Shapes: videos [B, C, T, H, W] in -1..1, latents [B, z, t, h, w] with T = 4 (t - 1) + 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import comfy.ops
from comfy.ldm.modules.attention import scaled_dot_product
from comfy.ldm.modules.cells import cells_of, from_cells
from comfy.ldm.pace import Pace

ops = comfy.ops.manual_cast
Cache = dict[nn.Module, torch.Tensor]
"""The last frames that each layer over time has seen."""
FRAMES_PER_LATENT = 4


class _OverTime(nn.Module):
    """A layer that takes a `Cache` besides its input."""


def through(layers: Iterable[nn.Module], x: torch.Tensor, cache: Cache) -> torch.Tensor:
    """`layers` one after the other; those over time with the cache."""
    for layer in layers:
        x = layer(x, cache) if isinstance(layer, (_OverTime, CausalConv3d)) else layer(x)
    return x


class CausalConv3d(ops.Conv3d):
    """A convolution whose output at a frame depends on that frame and those before it; there are zeros before the first."""

    def __init__(self, in_dim: int, out_dim: int, kernel_size: Any, padding: Any = 0) -> None:
        time, *space = (padding,) * 3 if isinstance(padding, int) else padding
        super().__init__(in_dim, out_dim, kernel_size, padding=(0, *space))
        self.frames = 2 * time

    def forward(self, x: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        if self.frames:
            before = None if cache is None else cache.get(self)
            if before is None:
                before = x.new_zeros((*x.shape[:2], self.frames, *x.shape[3:]))
            x = torch.cat((before, x), dim=2)
            if cache is not None:
                cache[self] = x[:, :, -self.frames :].clone()
        return super().forward(x)


class RMS_norm(nn.Module):  # noqa: N801 (ComfyUI's name)
    """Root-mean-square norm over the channels of [B, C, ...]; `axes` sizes of 1 follow in the weight."""

    def __init__(self, dim: int, axes: int = 3) -> None:
        super().__init__()
        self.scale = math.sqrt(dim)
        self.gamma = nn.Parameter(torch.empty(dim, *[1] * axes), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x, dim=1) * (comfy.ops.cast_to_input(self.gamma, x, copy=False) * self.scale)


class ResidualBlock(_OverTime):
    """[B, in_dim, T, H, W] -> [B, out_dim, T, H, W]."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            RMS_norm(in_dim), nn.SiLU(), CausalConv3d(in_dim, out_dim, 3, 1),
            RMS_norm(out_dim), nn.SiLU(), nn.Identity(), CausalConv3d(out_dim, out_dim, 3, 1),
        )  # fmt: skip
        self.shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        return self.shortcut(x) + through(self.residual, x, cache)


class AttentionBlock(nn.Module):
    """Attention of one head over all places of a frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMS_norm(dim, axes=2)
        self.to_qkv = ops.Conv2d(dim, dim * 3, 1)
        self.proj = ops.Conv2d(dim, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        frames = x.transpose(1, 2).flatten(0, 1)
        q, k, v = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        out = scaled_dot_product(q, k, v).squeeze(1).transpose(1, 2).reshape(frames.shape)
        return x + self.proj(out).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def _by_frame(layers: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Layers over frames [B * T, C, H, W] on [B, C, T, H, W]."""
    out = layers(x.transpose(1, 2).flatten(0, 1))
    return out.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class Downsample(_OverTime):
    """Halve height and width; with `time` also the frames after the first."""

    def __init__(self, dim: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), ops.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = ops.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        x = _by_frame(self.resample, x)
        if self.time_conv is None:
            return x
        before, cache[self] = cache.get(self), x[:, :, -1:].clone()
        return x if before is None else self.time_conv(torch.cat((before, x), dim=2))


class Upsample(_OverTime):
    """Double height and width; with `time` also the frames after the first."""

    def __init__(self, dim: int, out_dim: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact"), ops.Conv2d(dim, out_dim, 3, padding=1)
        )
        self.time_conv = CausalConv3d(dim, dim * 2, (3, 1, 1), (1, 0, 0)) if time else None

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        if self.time_conv is not None:
            if self in cache:  # the first frame is neither doubled nor seen by the convolution
                x = self.time_conv(x, cache).unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
            cache[self] = x[:, :, :0]
        return _by_frame(self.resample, x)


class AverageDown(_OverTime):
    """Cells of `time` x `space` x `space` as channels, and means of as many of these as make `out_dim`."""

    def __init__(self, out_dim: int, time: int, space: int) -> None:
        super().__init__()
        self.out_dim, self.time, self.space = out_dim, time, space

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.time, 0))
        folded = cells_of(x, self.time, self.space).flatten(1, 4)
        return folded.unflatten(1, (self.out_dim, -1)).mean(dim=2)


class RepeatUp(_OverTime):
    """Channels repeated until they make cells of `time` x `space` x `space`; of the first frame the last copy stays."""

    def __init__(self, in_dim: int, out_dim: int, time: int, space: int) -> None:
        super().__init__()
        self.time, self.space = time, space
        self.repeats = out_dim * time * space**2 // in_dim

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        cells = x.repeat_interleave(self.repeats, dim=1).unflatten(1, (-1, self.time, self.space, self.space))
        out = from_cells(cells)
        first = self not in cache
        cache[self] = x[:, :, :0]
        return out[:, :, self.time - 1 :] if first else out


class _Level(_OverTime):
    """Layers of one resolution beside a shortcut (Wan 2.2); `name` is their name in the files."""

    def __init__(self, name: str, layers: Sequence[nn.Module], shortcut: nn.Module | None) -> None:
        super().__init__()
        self.name = name
        setattr(self, name, nn.Sequential(*layers))
        self.avg_shortcut = shortcut

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        out = through(getattr(self, self.name), x, cache)
        return out if self.avg_shortcut is None else out + self.avg_shortcut(x, cache)


def _middle(dim: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


def _head(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(RMS_norm(dim), nn.SiLU(), CausalConv3d(dim, out_dim, 3, 1))


class Encoder(_OverTime):
    """A piece of a video -> a piece of its moments [B, 2z, t, h, w]."""

    def __init__(
        self,
        dim: int,
        z_dim: int,
        mult: Sequence[int],
        blocks: int,
        time: Sequence[bool],
        channels: int,
        residual: bool,
    ) -> None:
        super().__init__()
        widths = [dim * m for m in (1, *mult)]
        self.conv1 = CausalConv3d(channels, widths[0], 3, 1)
        levels: list[nn.Module] = []
        for i, (width, out) in enumerate(zip(widths, widths[1:])):
            layers: list[nn.Module] = [ResidualBlock(width if j == 0 else out, out) for j in range(blocks)]
            last = i == len(mult) - 1
            if not last:
                layers.append(Downsample(out, time[i]))
            if residual:
                shortcut = AverageDown(out, 1 if last or not time[i] else 2, 1 if last else 2)
                layers = [_Level("downsamples", layers, shortcut)]
            levels += layers
        self.downsamples = nn.Sequential(*levels)
        self.middle = _middle(widths[-1])
        self.head = _head(widths[-1], 2 * z_dim)

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        return through((self.conv1, *self.downsamples, *self.middle, *self.head), x, cache)


class Decoder(_OverTime):
    """A piece of a latent -> a piece of the video."""

    def __init__(
        self,
        dim: int,
        z_dim: int,
        mult: Sequence[int],
        blocks: int,
        time: Sequence[bool],
        channels: int,
        residual: bool,
    ) -> None:
        super().__init__()
        widths = [dim * m for m in (mult[-1], *reversed(mult))]
        self.conv1 = CausalConv3d(z_dim, widths[0], 3, 1)
        self.middle = _middle(widths[0])
        levels: list[nn.Module] = []
        for i, (width, out) in enumerate(zip(widths, widths[1:])):
            if i and not residual:
                width //= 2  # the upsampling before it halves the channels
            layers: list[nn.Module] = [ResidualBlock(width if j == 0 else out, out) for j in range(blocks + 1)]
            last = i == len(mult) - 1
            if not last:
                layers.append(Upsample(out, out if residual else out // 2, time[-1 - i]))
            if residual:
                shortcut = None if last else RepeatUp(width, out, 2 if time[-1 - i] else 1, 2)
                layers = [_Level("upsamples", layers, shortcut)]
            levels += layers
        self.upsamples = nn.Sequential(*levels)
        self.head = _head(widths[-1], channels)

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        return through((self.conv1, *self.middle, *self.upsamples, *self.head), x, cache)


class WanVAE(nn.Module):
    """The VAE of Wan 2.1, and with `residual` that of Wan 2.2 5B; `encode` gives the mean."""

    def __init__(
        self, dim: int = 96, z_dim: int = 16, dim_mult: Sequence[int] = (1, 2, 4, 4), num_res_blocks: int = 2,
        attn_scales: Sequence[float] = (), temperal_downsample: Sequence[bool] = (False, True, True),
        dropout: float = 0.0, image_channels: int = 3, conv_out_channels: int | None = None,
        decoder_dim: int | None = None, residual: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if attn_scales:
            raise ValueError(f"attn_scales {attn_scales}: attention outside the middle is not part of any Wan VAE")
        self.z_dim, self.patch = z_dim, 2 if residual else 1
        self.image_channels = image_channels
        cells = self.patch**2
        out_channels = image_channels if conv_out_channels is None else conv_out_channels
        settings = (z_dim, tuple(dim_mult), num_res_blocks, tuple(temperal_downsample))
        self.encoder = Encoder(dim, *settings, channels=image_channels * cells, residual=residual)
        self.conv1 = CausalConv3d(z_dim * 2, z_dim * 2, 1)
        self.conv2 = CausalConv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(decoder_dim or dim, *settings, channels=out_channels * cells, residual=residual)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Video [B, C, T, H, W] -> mean latent; frames after the last multiple of four are left out."""
        x = self._with_channels(x)
        if self.patch > 1:  # cells as channels, columns before rows
            x = cells_of(x, 1, self.patch).transpose(3, 4).flatten(1, 4)
        bounds = [0, *range(1, x.shape[2] + 1, FRAMES_PER_LATENT)]
        out = self._in_pieces(self.encoder, x, bounds)
        return self.conv1(out).chunk(2, dim=1)[0]

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latent [B, z, t, h, w] -> video."""
        out = self._in_pieces(self.decoder, self.conv2(z), range(z.shape[2] + 1))
        if self.patch > 1:
            out = from_cells(out.unflatten(1, (-1, 1, self.patch, self.patch)).transpose(3, 4))
        return out

    def _with_channels(self, x: torch.Tensor) -> torch.Tensor:
        """Missing channels (alpha) filled with ones, those too many cut off."""
        missing = self.image_channels - x.shape[1]
        if missing > 0:
            return torch.cat((x, x.new_ones((x.shape[0], missing, *x.shape[2:]))), dim=1)
        return x[:, : self.image_channels]

    @staticmethod
    def _in_pieces(coder: nn.Module, x: torch.Tensor, bounds: Sequence[int]) -> torch.Tensor:
        """`coder` on the pieces of x between neighbouring bounds; between them a cancelled prompt ends."""
        cache: Cache = {}
        pace, out = Pace(len(bounds) > 2), []
        for start, stop in zip(bounds, bounds[1:]):
            out.append(coder(x[:, :, start:stop], cache))
            pace.step(out[-1])
        return torch.cat(out, dim=2)


def config_from_state_dict(sd: dict[str, torch.Tensor]) -> dict[str, Any] | None:
    """The arguments of `WanVAE` for these weights, or None when they are of another VAE."""
    if "decoder.middle.0.residual.0.gamma" not in sd or "encoder.conv1.weight" not in sd:
        return None
    residual = "decoder.upsamples.0.upsamples.0.residual.2.weight" in sd
    cells = 4 if residual else 1
    config = {
        "dim": sd["encoder.conv1.weight"].shape[0],
        "decoder_dim": sd["decoder.head.0.gamma"].shape[0],
        "z_dim": sd["conv2.weight"].shape[0],
        "image_channels": sd["encoder.conv1.weight"].shape[1] // cells,
        "conv_out_channels": sd["decoder.head.2.weight"].shape[0] // cells,
    }
    return {**config, "residual": residual}
