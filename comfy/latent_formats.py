"""How each family scales its latents, and the factors that turn them into a rough RGB preview.

The figures are data (`latent_formats.json`); a class per format carries them under ComfyUI's attribute names.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch


class LatentFormat:
    """Scaling between a VAE's latent and the network's: network = (latent - shift) * scale."""

    scale_factor: float = 1.0
    shift_factor: float | None = None
    latent_channels: int = 4
    latent_dimensions: int = 2
    latent_rgb_factors: list[list[float]] | None = None
    latent_rgb_factors_bias: list[float] | None = None
    latent_rgb_factors_reshape: Any = None
    taesd_decoder_name: str | None = None

    def process_in(self, latent: torch.Tensor) -> torch.Tensor:
        """VAE latent [B, C, ...] -> the network's."""
        if self.shift_factor is not None:
            latent = latent - self.shift_factor
        return latent * self.scale_factor

    def process_out(self, latent: torch.Tensor) -> torch.Tensor:
        """The network's latent -> VAE latent."""
        latent = latent / self.scale_factor
        return latent if self.shift_factor is None else latent + self.shift_factor


class _Standardised(LatentFormat):
    """Formats with a mean and a standard deviation per channel."""

    mean: list[float]
    std: list[float]

    def __init__(self) -> None:
        shape = (1, self.latent_channels) + (1,) * self.latent_dimensions
        self.latents_mean = torch.tensor(self.mean).reshape(shape)
        self.latents_std = torch.tensor(self.std).reshape(shape)

    def process_in(self, latent: torch.Tensor) -> torch.Tensor:
        mean, std = self.latents_mean.to(latent), self.latents_std.to(latent)
        return (latent - mean) * self.scale_factor / std

    def process_out(self, latent: torch.Tensor) -> torch.Tensor:
        mean, std = self.latents_mean.to(latent), self.latents_std.to(latent)
        return latent * std / self.scale_factor + mean


class _FramePairs(LatentFormat):
    """HunyuanImage 2.1's refiner: the first frame doubled, then pairs of frames as channels."""

    def process_in(self, latent: torch.Tensor) -> torch.Tensor:
        frames = latent * self.scale_factor
        frames = torch.cat((frames[:, :, :1], frames), dim=2).movedim(2, 1)
        batch, count, channels, *size = frames.shape
        return frames.reshape(batch, count // 2, channels * 2, *size).movedim(1, 2)

    def process_out(self, latent: torch.Tensor) -> torch.Tensor:
        frames = (latent / self.scale_factor).movedim(1, 2)
        batch, pairs, channels, *size = frames.shape
        return frames.reshape(batch, pairs * 2, channels // 2, *size).movedim(1, 2)[:, :, 1:]


def _load() -> dict[str, type[LatentFormat]]:
    with open(os.path.join(os.path.dirname(__file__), "latent_formats.json"), encoding="utf-8") as file:
        formats = json.load(file)
    out = {}
    for name, values in formats.items():
        base: type[LatentFormat] = LatentFormat
        if "latents_mean" in values:
            base = _Standardised
            values["mean"], values["std"] = values.pop("latents_mean"), values.pop("latents_std")
        elif name == "HunyuanImage21Refiner":
            base = _FramePairs
        out[name] = type(name, (base,), {**values, "__doc__": f"Latents of {name}.", "__module__": __name__})
    return out


_FORMATS = _load()
ACEAudio = _FORMATS["ACEAudio"]
ChromaRadiance = _FORMATS["ChromaRadiance"]
Cosmos1CV8x8x8 = _FORMATS["Cosmos1CV8x8x8"]
Flux = _FORMATS["Flux"]
Hunyuan3Dv2 = _FORMATS["Hunyuan3Dv2"]
Hunyuan3Dv2_1 = _FORMATS["Hunyuan3Dv2_1"]
Hunyuan3Dv2mini = _FORMATS["Hunyuan3Dv2mini"]
HunyuanImage21 = _FORMATS["HunyuanImage21"]
HunyuanImage21Refiner = _FORMATS["HunyuanImage21Refiner"]
HunyuanVideo = _FORMATS["HunyuanVideo"]
LTXV = _FORMATS["LTXV"]
Mochi = _FORMATS["Mochi"]
SC_B = _FORMATS["SC_B"]
SC_Prior = _FORMATS["SC_Prior"]
SD15 = _FORMATS["SD15"]
SD3 = _FORMATS["SD3"]
SDXL = _FORMATS["SDXL"]
SDXL_Playground_2_5 = _FORMATS["SDXL_Playground_2_5"]
SD_X4 = _FORMATS["SD_X4"]
StableAudio1 = _FORMATS["StableAudio1"]
Wan21 = _FORMATS["Wan21"]
Wan22 = _FORMATS["Wan22"]
