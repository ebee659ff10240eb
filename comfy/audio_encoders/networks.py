"""Networks that make features of speech: wav2vec 2.0 (Baevski et al. 2020) and Whisper's encoder (Radford et al. 2022).

Weights have the names of the transformers library. Shapes: B sounds, n samples, t states, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

import comfy.ops
from comfy.ldm.modules.attention import scaled_dot_product

ops = comfy.ops.manual_cast
StateDict = Mapping[str, torch.Tensor]
SAMPLE_RATE = 16000
HEAD = 64
_STRIDES = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))  # kernels and strides: 320 samples a state


class Attention(nn.Module):
    """Self-attention over states [B, t, C]."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module

    def __init__(self, channels: int, key_bias: bool = True) -> None:
        super().__init__()
        self.heads = channels // HEAD
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, ops.Linear(channels, channels, bias=key_bias or name != "k_proj"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in projections)
        return self.out_proj(scaled_dot_product(q, k, v).transpose(1, 2).flatten(2))


# --- wav2vec 2.0 ------------------------------------------------------------------------------------------------------


class _ConvLayer(nn.Module):
    """A convolution along the sound; norm: over channels, "time" (each channel over the whole sound), or none."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int, bias: bool, norm: str | None) -> None:
        super().__init__()
        self.conv = ops.Conv1d(in_channels, channels, kernel, stride, bias=bias)
        self.over_time = norm == "time"
        self.layer_norm = None
        if norm is not None:
            self.layer_norm = ops.GroupNorm(channels, channels) if self.over_time else ops.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        if self.layer_norm is not None:
            x = self.layer_norm(x) if self.over_time else self.layer_norm(x.transpose(1, 2)).transpose(1, 2)
        return F.gelu(x)


class _FeatureExtractor(nn.Module):
    def __init__(self, channels: int, norms: bool, bias: bool) -> None:
        super().__init__()
        kinds = ["channels"] * len(_STRIDES) if norms else ["time", *[None] * (len(_STRIDES) - 1)]
        self.conv_layers = nn.ModuleList(
            _ConvLayer(channels if i else 1, channels, kernel, stride, bias, kinds[i])
            for i, (kernel, stride) in enumerate(_STRIDES)
        )

    def forward(self, sound: torch.Tensor) -> torch.Tensor:
        x = sound.unsqueeze(1)
        for layer in self.conv_layers:
            x = layer(x)
        return x.transpose(1, 2)


class _FeatureProjection(nn.Module):
    def __init__(self, features: int, channels: int) -> None:
        super().__init__()
        self.layer_norm = ops.LayerNorm(features)
        self.projection = ops.Linear(features, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(self.layer_norm(x))


class _Positions(nn.Module):
    """A grouped convolution over 128 states, added to them as positions."""

    def __init__(self, channels: int, kernel: int = 128, groups: int = 16) -> None:
        super().__init__()
        self.conv = ops.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.conv(x.transpose(1, 2))[:, :, : x.shape[1]]).transpose(1, 2)


class _FeedForward(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.intermediate_dense = ops.Linear(channels, inner)
        self.output_dense = ops.Linear(inner, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output_dense(F.gelu(self.intermediate_dense(x)))


class _Layer(nn.Module):
    """norm_first: norms before attention and MLP, else after them."""

    def __init__(self, channels: int, inner: int, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention = Attention(channels)
        self.layer_norm = ops.LayerNorm(channels)
        self.feed_forward = _FeedForward(channels, inner)
        self.final_layer_norm = ops.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.norm_first:
            x = x + self.attention(self.layer_norm(x))
            return x + self.feed_forward(self.final_layer_norm(x))
        x = self.layer_norm(x + self.attention(x))
        return self.final_layer_norm(x + self.feed_forward(x))


class _Transformer(nn.Module):
    def __init__(self, channels: int, inner: int, layers: int, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.pos_conv_embed = _Positions(channels)
        self.layers = nn.ModuleList(_Layer(channels, inner, norm_first) for _ in range(layers))
        self.layer_norm = ops.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = x + self.pos_conv_embed(x)
        states = [x if self.norm_first else self.layer_norm(x)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        if self.norm_first:
            states[-1] = self.layer_norm(states[-1])
        return states


class Wav2Vec2Model(nn.Module):
    """Speech at 16 kHz -> 50 states a second after each layer."""

    def __init__(
        self, features: int, channels: int, inner: int, layers: int, norm_first: bool, conv_bias: bool
    ) -> None:
        super().__init__()
        self.normalise = norm_first  # the models that norm first were trained on sounds of variance 1
        self.feature_extractor = _FeatureExtractor(features, norm_first, conv_bias)
        self.feature_projection = _FeatureProjection(features, channels)
        self.encoder = _Transformer(channels, inner, layers, norm_first)

    def forward(self, sound: torch.Tensor) -> list[torch.Tensor]:
        """Mono sounds [B, n] -> states [B, t, C] before the first layer and after each."""
        if self.normalise:
            sound = (sound - sound.mean(dim=-1, keepdim=True)) / (sound.var(dim=-1, keepdim=True) + 1e-7).sqrt()
        return self.encoder(self.feature_projection(self.feature_extractor(sound)))


def _whole_positions(sd: StateDict) -> dict[str, torch.Tensor]:
    """Weights with the positions' convolution as one tensor instead of a direction and its length (weight norm)."""
    stem = "encoder.pos_conv_embed.conv."
    for length, direction in (("parametrizations.weight.original0", "parametrizations.weight.original1"),
                              ("weight_g", "weight_v")):  # fmt: skip
        if stem + direction in sd:
            v = sd[stem + direction].float()
            weight = v * (sd[stem + length].float() / v.norm(dim=(0, 1), keepdim=True))
            rest = {key: value for key, value in sd.items() if key not in (stem + length, stem + direction)}
            return {**rest, f"{stem}weight": weight.to(sd[stem + direction].dtype)}
    return dict(sd)


# --- Whisper ----------------------------------------------------------------------------------------------------------


def mel_filters(count: int, bins: int, rate: int = SAMPLE_RATE) -> torch.Tensor:
    """Triangles [bins, count] of area 1 over frequencies from 0 to half the rate, evenly spread on Slaney's mel scale.

    The scale is linear (200/3 Hz a mel) up to 1000 Hz, and logarithmic above (6.4 times in 27 mels).
    """
    top = 15 + torch.log(torch.tensor(rate / 2 / 1000.0, dtype=torch.float64)) / torch.log(torch.tensor(6.4)) * 27
    mels = torch.linspace(0, float(top), count + 2, dtype=torch.float64)
    edges = torch.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    frequencies = torch.linspace(0, rate / 2, bins, dtype=torch.float64)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (edges[2:] - edges[:-2])).float()


class _WhisperLayer(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.self_attn = Attention(channels, key_bias=False)
        self.self_attn_layer_norm = ops.LayerNorm(channels)
        self.fc1 = ops.Linear(channels, inner)
        self.fc2 = ops.Linear(inner, channels)
        self.final_layer_norm = ops.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class _WhisperEncoder(nn.Module):
    def __init__(self, mels: int, channels: int, inner: int, layers: int, length: int) -> None:
        super().__init__()
        self.conv1 = ops.Conv1d(mels, channels, 3, padding=1)
        self.conv2 = ops.Conv1d(channels, channels, 3, stride=2, padding=1)
        self.embed_positions = ops.Embedding(length, channels)
        self.layers = nn.ModuleList(_WhisperLayer(channels, inner) for _ in range(layers))
        self.layer_norm = ops.LayerNorm(channels)

    def forward(self, mel: torch.Tensor) -> list[torch.Tensor]:
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2)
        states = [x + comfy.ops.cast_to_input(self.embed_positions.weight, x)[: x.shape[1]]]
        for layer in self.layers:
            states.append(layer(states[-1]))
        states[-1] = self.layer_norm(states[-1])
        return states


class WhisperModel(nn.Module):
    """Speech at 16 kHz, cut or filled with silence to 30 s -> 50 states a second after each layer."""

    window, hop = 400, 160

    def __init__(self, mels: int, channels: int, inner: int, layers: int, length: int) -> None:
        super().__init__()
        self.mels, self.samples = mels, length * 2 * self.hop
        self.encoder = _WhisperEncoder(mels, channels, inner, layers, length)

    def log_mel(self, sound: torch.Tensor) -> torch.Tensor:
        """Mono sounds [B, n] -> logarithms of energies [B, mels, 2 * length] in at most about -1..1."""
        sound = F.pad(sound, (0, max(0, self.samples - sound.shape[-1])))[..., : self.samples]
        hann = torch.hann_window(self.window, device=sound.device)
        spectrum = torch.stft(sound, self.window, self.hop, window=hann, return_complex=True)[..., :-1]
        filters = mel_filters(self.mels, self.window // 2 + 1).to(sound.device)
        energy = torch.matmul(filters.T, spectrum.abs().square())
        levels = energy.clamp(min=1e-10).log10()
        return (torch.maximum(levels, levels.amax(dim=(1, 2), keepdim=True) - 8.0) + 4.0) / 4.0

    def forward(self, sound: torch.Tensor) -> list[torch.Tensor]:
        """Mono sounds [B, n] -> states [B, length, C] before the first layer and after each."""
        return self.encoder(self.log_mel(sound))


# --- files ------------------------------------------------------------------------------------------------------------


def _layers(sd: StateDict) -> int:
    return 1 + max(int(key.split(".")[2]) for key in sd if key.startswith("encoder.layers."))


def from_state_dict(sd: StateDict) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """(the network on the meta device, its weights) of a file.

    Raises ValueError for weights of other networks.
    """
    weights = {key.removeprefix("wav2vec2.").removeprefix("model."): value for key, value in sd.items()}
    with torch.device("meta"):
        if "encoder.embed_positions.weight" in weights and "encoder.conv1.weight" in weights:
            length, channels = weights["encoder.embed_positions.weight"].shape
            mels, inner = weights["encoder.conv1.weight"].shape[1], weights["encoder.layers.0.fc1.weight"].shape[0]
            return WhisperModel(mels, channels, inner, _layers(weights), length), weights
        first = weights.get("feature_extractor.conv_layers.1.conv.weight")
        if first is None or "encoder.layers.0.feed_forward.intermediate_dense.weight" not in weights:
            raise ValueError("unknown audio encoder; use a file of wav2vec 2.0 or of Whisper's encoder")
        inner, channels = weights["encoder.layers.0.feed_forward.intermediate_dense.weight"].shape
        network = Wav2Vec2Model(
            first.shape[0], channels, inner, _layers(weights),
            norm_first="feature_extractor.conv_layers.1.layer_norm.weight" in weights,
            conv_bias="feature_extractor.conv_layers.1.conv.bias" in weights,
        )  # fmt: skip
    return network, _whole_positions(weights)
