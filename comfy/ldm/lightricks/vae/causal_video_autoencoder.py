"""The video VAE of LTX-Video (HaCohen et al. 2024): 4 x 4 pixels of a frame are channels of one place, and the rest is
causal convolutions over time that make videos 8 times shorter and places 8 times larger.

Versions differ in their blocks, which are read from the weights: 0.9.0 narrows and widens by convolutions; in 0.9.1 the
decoder is told how much noise is in the latent, and removes it; from 0.9.5 on the encoder folds cells into channels.
Shapes: videos [B, 3, T, H, W] in -1..1, latents [B, z, t, h, w] with T = 8 (t - 1) + 1 and 32 pixels a cell and side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import comfy.ops
from comfy.ldm.flux.layers import timestep_embedding
from comfy.ldm.modules.cells import cells_of, from_cells
from comfy.ldm.modules.mlp import TimestepEmbedding
from comfy.ldm.pace import Pace

from .causal_conv3d import CausalConv3d
from .pixel_norm import PixelNorm

ops = comfy.ops.manual_cast
StateDict = Mapping[str, torch.Tensor]
Stride = tuple[int, int, int]
NOISE = 0.025
"""Share of noise in latents that decoders which know a time expect."""
DECODE_TIME = 0.05
"""The time that they are told."""
_STRIDES: dict[int, Stride] = {8: (2, 2, 2), 4: (1, 2, 2), 2: (2, 1, 1)}
_FEATURES = 256


def fold(x: torch.Tensor, stride: Stride) -> torch.Tensor:
    """[B, C, T, H, W] -> [B, C * cells, T / t, H / s, W / s]: places of a cell become channels, the column last."""
    return cells_of(x, *stride[:2]).flatten(1, 4)


def unfold(x: torch.Tensor, stride: Stride) -> torch.Tensor:
    """The reverse of `fold`."""
    return from_cells(x.unflatten(1, (-1, *stride)))


class _Context:
    """What blocks need beside their input: whether they look back only, the time's features, and noise."""

    def __init__(self, causal: bool, time: torch.Tensor | None = None) -> None:
        self.causal, self.time = causal, time
        self._noise = torch.Generator().manual_seed(0)

    def noise(self, x: torch.Tensor) -> torch.Tensor:
        """The same noise [H, W] for all frames and channels. It is drawn on the host: ranks and runs agree."""
        return torch.randn(x.shape[-2:], generator=self._noise).to(x.device, x.dtype)


class _ChannelNorm(nn.Module):
    """Layer norm over the channels of [B, C, T, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ops.LayerNorm(channels, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class ResnetBlock3D(nn.Module):
    """[B, in_channels, T, H, W] -> [B, out_channels, T, H, W].

    timed: shift and scale of both norms follow the time. noise: noise is added after both convolutions.
    """

    def __init__(
        self, in_channels: int, out_channels: int, timed: bool = False, noise: bool = False, padding: str = "zeros"
    ) -> None:
        super().__init__()
        self.norm = PixelNorm()
        self.conv1 = CausalConv3d(in_channels, out_channels, spatial_padding_mode=padding)
        self.conv2 = CausalConv3d(out_channels, out_channels, spatial_padding_mode=padding)
        self.norm3 = self.conv_shortcut = None
        if in_channels != out_channels:
            self.norm3 = _ChannelNorm(in_channels)
            self.conv_shortcut = ops.Conv3d(in_channels, out_channels, 1)
        if noise:
            self.per_channel_scale1, self.per_channel_scale2 = (_learned(out_channels, 1, 1) for _ in range(2))
        self.noise = noise
        self.scale_shift_table = _learned(4, in_channels) if timed else None

    def _add_noise(self, x: torch.Tensor, scale: torch.Tensor, context: _Context) -> torch.Tensor:
        return x + comfy.ops.cast_to_input(scale, x, copy=False).unsqueeze(1) * context.noise(x)

    def forward(self, x: torch.Tensor, context: _Context, time: torch.Tensor | None = None) -> torch.Tensor:
        """time: [B, 4 * in_channels], what the time adds to both shifts and scales."""
        rows: Sequence[Any] = (None,) * 4
        if self.scale_shift_table is not None:
            assert time is not None
            table = comfy.ops.cast_to_input(self.scale_shift_table, x, copy=False) + time.unflatten(1, (4, -1))
            rows = table[..., None, None, None].unbind(dim=1)
        h = self.conv1(F.silu(_modulated(self.norm(x), *rows[:2])), context.causal)
        if self.noise:
            h = self._add_noise(h, self.per_channel_scale1, context)
        h = self.conv2(F.silu(_modulated(self.norm(h), *rows[2:])), context.causal)
        if self.noise:
            h = self._add_noise(h, self.per_channel_scale2, context)
        if self.norm3 is not None and self.conv_shortcut is not None:
            x = self.conv_shortcut(self.norm3(x))
        return x + h


def _learned(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)


def _modulated(x: torch.Tensor, shift: torch.Tensor | None, scale: torch.Tensor | None) -> torch.Tensor:
    return x if shift is None or scale is None else x * (1 + scale) + shift


class _TimeEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(_FEATURES, width, {}, ops)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.timestep_embedder(features)


class UNetMidBlock3D(nn.Module):
    """Blocks of one width; with `timed` they share what is made of the time."""

    def __init__(self, channels: int, layers: int, timed: bool, noise: bool, padding: str) -> None:
        super().__init__()
        self.time_embedder = _TimeEmbedder(4 * channels) if timed else None
        self.res_blocks = nn.ModuleList(ResnetBlock3D(channels, channels, timed, noise, padding) for _ in range(layers))

    def forward(self, x: torch.Tensor, context: _Context) -> torch.Tensor:
        time = None if self.time_embedder is None else self.time_embedder(context.time)
        for block in self.res_blocks:
            x = block(x, context, time)
        return x


class _Strided(CausalConv3d):
    """A convolution that halves frames, rows and columns."""

    def __init__(self, channels: int, padding: str) -> None:
        super().__init__(channels, channels, stride=2, spatial_padding_mode=padding)

    def forward(self, x: torch.Tensor, context: Any) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x)


class SpaceToDepthDownsample(nn.Module):
    """Cells folded into channels by a convolution, beside the means of groups of the folded input."""

    def __init__(self, channels: int, out_channels: int, stride: Stride, padding: str) -> None:
        super().__init__()
        cells = math.prod(stride)
        self.stride, self.groups = stride, out_channels
        self.conv = CausalConv3d(channels, out_channels // cells, spatial_padding_mode=padding)

    def forward(self, x: torch.Tensor, context: _Context) -> torch.Tensor:
        if self.stride[0] == 2:  # so that the first frame makes a cell by itself
            x = torch.cat((x[:, :, :1], x), dim=2)
        means = fold(x, self.stride).unflatten(1, (self.groups, -1)).mean(dim=2)
        return fold(self.conv(x, context.causal), self.stride) + means


class DepthToSpaceUpsample(nn.Module):
    """Channels unfolded into cells by a convolution, with `residual` beside the unfolded input, repeated."""

    def __init__(self, channels: int, made: int, stride: Stride, residual: bool, padding: str) -> None:
        super().__init__()
        self.stride, self.residual = stride, residual
        self.repeats = made // channels
        self.conv = CausalConv3d(channels, made, spatial_padding_mode=padding)

    def forward(self, x: torch.Tensor, context: _Context) -> torch.Tensor:
        first = self.stride[0] - 1  # the first frame is made once, not twice
        out = unfold(self.conv(x, context.causal), self.stride)[:, :, first:]
        if not self.residual:
            return out
        return out + torch.cat([unfold(x, self.stride)[:, :, first:]] * self.repeats, dim=1)


def _made(part: Mapping[str, Any], padding: str) -> nn.Module:
    """The module of a part of `config_from_state_dict`."""
    kinds: dict[str, Callable[..., nn.Module]] = {
        "res": UNetMidBlock3D, "widen": ResnetBlock3D, "stride": _Strided, "fold": SpaceToDepthDownsample,
        "unfold": DepthToSpaceUpsample,
    }  # fmt: skip
    settings = {name: value for name, value in part.items() if name != "kind"}
    return kinds[part["kind"]](**settings, padding=padding)


class Encoder(nn.Module):
    """Video [B, 3, T, H, W] -> means [B, z, t, h, w]."""

    def __init__(self, parts: Sequence[Mapping[str, Any]], ends: Sequence[int], z_dim: int, patch: int, padding: str):
        super().__init__()
        channels, first, last, out = ends
        self.patch, self.z_dim = patch, z_dim
        self.conv_in = CausalConv3d(channels, first, spatial_padding_mode=padding)
        self.down_blocks = nn.ModuleList(_made(part, padding) for part in parts)
        self.norm = PixelNorm()
        self.conv_out = CausalConv3d(last, out, spatial_padding_mode=padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pace, context = Pace(True), _Context(causal=True)
        h = self.conv_in(cells_of(x, 1, self.patch).transpose(3, 4).flatten(1, 4))  # columns of a patch before rows
        for block in self.down_blocks:
            h = block(h, context)
            pace.step(h)
        return self.conv_out(F.silu(self.norm(h)))[:, : self.z_dim]


class Decoder(nn.Module):
    """Latent [B, z, t, h, w] -> video."""

    def __init__(
        self, parts: Sequence[Mapping[str, Any]], ends: Sequence[int], timed: bool, causal: bool, patch: int,
        padding: str,
    ) -> None:  # fmt: skip
        super().__init__()
        z_dim, first, last, out = ends
        self.patch, self.causal = patch, causal
        self.conv_in = CausalConv3d(z_dim, first, spatial_padding_mode=padding)
        self.up_blocks = nn.ModuleList(_made(part, padding) for part in parts)
        self.norm = PixelNorm()
        self.conv_out = CausalConv3d(last, out, spatial_padding_mode=padding)
        self.timed = timed
        if timed:
            self.timestep_scale_multiplier = _learned()
            self.last_time_embedder = _TimeEmbedder(2 * last)
            self.last_scale_shift_table = _learned(2, last)

    def _features(self, time: float, x: torch.Tensor) -> torch.Tensor | None:
        """Features [B, 256] of the time."""
        if not self.timed:
            return None
        scaled = self.timestep_scale_multiplier.to(x.device, torch.float32) * time
        return timestep_embedding(scaled.expand(x.shape[0]), _FEATURES, time_factor=1.0).to(x.dtype)

    def forward(self, z: torch.Tensor, time: float) -> torch.Tensor:
        pace, context = Pace(True), _Context(self.causal, self._features(time, z))
        h = self.conv_in(z, self.causal)
        for block in self.up_blocks:
            h = block(h, context)
            pace.step(h)
        h = self.norm(h)
        if self.timed:
            added = self.last_time_embedder(context.time).unflatten(1, (2, -1))
            table = comfy.ops.cast_to_input(self.last_scale_shift_table, h, copy=False) + added
            h = _modulated(h, *table[..., None, None, None].unbind(dim=1))
        h = self.conv_out(F.silu(h), self.causal)
        return from_cells(h.unflatten(1, (-1, 1, self.patch, self.patch)).transpose(3, 4))


class VideoVAE(nn.Module):
    """The autoencoder; `encode` gives the mean. `config`: what `config_from_state_dict` returns."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        shared = {"patch": config["patch"], "padding": config["padding"]}
        z_dim = config["z_dim"]
        self.encoder = Encoder(config["down"], config["encoder_ends"], z_dim, **shared)
        self.decoder = Decoder(config["up"], config["decoder_ends"], config["timed"], config["causal"], **shared)
        self.per_channel_statistics = nn.ParameterDict(
            {name: _learned(z_dim) for name in ("mean-of-means", "std-of-means")}
        )

    def _statistics(self, like: torch.Tensor) -> list[torch.Tensor]:
        """Mean and standard deviation [C, 1, 1, 1] of each channel."""
        names = ("mean-of-means", "std-of-means")
        return [comfy.ops.cast_to_input(self.per_channel_statistics[n], like)[:, None, None, None] for n in names]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Video [B, 3, T, H, W] -> mean latent, each channel of mean 0 and variance 1. T is one more than 8 k.

        Raises ValueError for another number of frames.
        """
        if (x.shape[2] - 1) % 8:
            raise ValueError(f"LTX-Video's VAE encodes 1, 9, 17, ... frames, not {x.shape[2]}; cut the video")
        means = self.encoder(x)
        mean, deviation = self._statistics(means)
        return (means - mean) / deviation

    def decode(self, z: torch.Tensor, timestep: float = DECODE_TIME) -> torch.Tensor:
        """Latent [B, z, t, h, w] -> video. Decoders that know a time expect noise in the latent (`NOISE`)."""
        mean, deviation = self._statistics(z)
        return self.decoder(z * deviation + mean, timestep)


# --- what the weights say ---------------------------------------------------------------------------------------------


def _width(sd: StateDict, stem: str, axis: int) -> int:
    """Channels that the first convolution of a block takes (axis 1) or makes (axis 0)."""
    names = ("res_blocks.0.conv1.conv", "conv1.conv", "conv.conv", "conv")
    return next(sd[f"{stem}{name}.weight"].shape[axis] for name in names if f"{stem}{name}.weight" in sd)


def _folding(cells: int, block: str) -> Stride:
    if cells not in _STRIDES:
        raise ValueError(f"{block} upsamples by {cells}, but LTX-Video's VAEs by 2, 4 or 8; the file is damaged")
    return _STRIDES[cells]


def _parts(sd: StateDict, side: str, ending: str, residuals: Sequence[bool] | None) -> list[dict[str, Any]]:
    """The parts of the encoder or the decoder in order; `residuals` of the decoder's upsamplings, if they are known."""
    count = 1 + max((int(key.split(".")[2]) for key in sd if key.startswith(f"{side}.")), default=-1)
    known, out = list(residuals or ()), []
    for i in range(count):
        stem = f"{side}.{i}."
        after = f"{side}.{i + 1}." if i + 1 < count else f"{ending}."
        channels, next_channels = _width(sd, stem, 1), _width(sd, after, 1)
        part: dict[str, Any]
        if f"{stem}res_blocks.0.conv1.conv.weight" in sd:
            layers = 1 + max(int(key.split(".")[4]) for key in sd if key.startswith(f"{stem}res_blocks."))
            part = {
                "kind": "res", "channels": channels, "layers": layers,
                "timed": f"{stem}time_embedder.timestep_embedder.linear_1.weight" in sd,
                "noise": f"{stem}res_blocks.0.per_channel_scale1" in sd,
            }  # fmt: skip
        elif f"{stem}conv1.conv.weight" in sd:
            part = {"kind": "widen", "in_channels": channels, "out_channels": _width(sd, stem, 0)}
        elif f"{stem}conv.conv.weight" not in sd:
            part = {"kind": "stride", "channels": channels}
        elif side.startswith("encoder"):
            stride = _folding(next_channels // _width(sd, stem, 0), stem)
            part = {"kind": "fold", "channels": channels, "out_channels": next_channels, "stride": stride}
        else:
            made = _width(sd, stem, 0)
            # Published decoders with a shortcut are those that lose channels here.
            residual = known.pop(0) if known else next_channels < channels
            stride = _folding(made // next_channels, stem)
            part = {"kind": "unfold", "channels": channels, "made": made, "stride": stride, "residual": residual}
        out.append(part)
    return out


def _residuals(blocks: Sequence[Any] | None) -> list[bool] | None:
    """Which upsamplings have a shortcut, from a file's configuration, where the decoder is listed from its end."""
    if blocks is None:
        return None
    settings = [block[1] for block in reversed(blocks) if str(block[0]).startswith("compress")]
    return [isinstance(given, Mapping) and bool(given.get("residual")) for given in settings]


def config_from_state_dict(sd: StateDict, told: Mapping[str, Any]) -> dict[str, Any] | None:
    """The argument of `VideoVAE` for these weights, or None when they are of another VAE.

    told: the part `vae` of the configuration in the file's metadata, for what weights do not show.
    Raises ValueError when the weights contradict each other.
    """
    if "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight" not in sd or "encoder.conv_in.conv.weight" not in sd:
        return None
    ends = {}
    for side in ("encoder", "decoder"):
        first, last = sd[f"{side}.conv_in.conv.weight"], sd[f"{side}.conv_out.conv.weight"]
        ends[side] = [first.shape[1], first.shape[0], last.shape[1], last.shape[0]]
    return {
        "down": _parts(sd, "encoder.down_blocks", "encoder.conv_out", None),
        "up": _parts(sd, "decoder.up_blocks", "decoder.conv_out", _residuals(told.get("decoder_blocks"))),
        "encoder_ends": ends["encoder"],
        "decoder_ends": ends["decoder"],
        "z_dim": ends["decoder"][0],
        "patch": math.isqrt(ends["encoder"][0] // 3),
        "timed": "decoder.last_scale_shift_table" in sd,
        "causal": bool(told.get("causal_decoder", False)),
        "padding": str(told.get("spatial_padding_mode", "zeros")),
    }


def ratios(config: Mapping[str, Any]) -> tuple[int, int]:
    """(frames for each latent frame after the first, pixels a cell and side)."""
    strides = [part.get("stride", (2, 2, 2)) for part in config["down"] if part["kind"] in ("fold", "stride")]
    return math.prod(s[0] for s in strides), config["patch"] * math.prod(s[1] for s in strides)
