"""How a model's latents differ from what its VAE writes: scale, shift, channel statistics, and linear previews."""

from __future__ import annotations

from typing import Any

import torch

import comfy.families
from comfy.latent_format_tables import PREVIEWS, STATISTICS


class LatentFormat:
    """(latent - shift) * scale, by channel where statistics are known.

    `latent_dimensions` is the number of spatial (and time) axes. `latent_rgb_factors` [channels][3] and
    `latent_rgb_factors_bias` [3] give a small preview in -1..1; `taesd_decoder_name` names a file for a better one.
    """

    scale_factor: float = 1.0
    shift_factor: float | None = None
    latent_channels: int = 4
    latent_dimensions: int = 2
    latent_rgb_factors: list[list[float]] | None = None
    latent_rgb_factors_bias: list[float] | None = None
    latent_rgb_factors_reshape: Any = None
    taesd_decoder_name: str | None = None
    latents_mean: torch.Tensor | None = None
    latents_std: torch.Tensor | None = None

    def __init__(self) -> None:
        name = type(self).__name__
        if self.latent_rgb_factors is None and name in PREVIEWS:
            red, green, blue, bias = PREVIEWS[name]
            self.latent_rgb_factors = [list(cell) for cell in zip(red, green, blue)]
            self.latent_rgb_factors_bias = bias
        if name in STATISTICS:
            shape = (1, self.latent_channels) + (1,) * self.latent_dimensions
            statistics = torch.tensor(STATISTICS[name])
            self.latents_mean, self.latents_std = (column.reshape(shape) for column in statistics.unbind(dim=1))

    def _statistics(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.latents_mean is not None and self.latents_std is not None
        return self.latents_mean.to(latent), self.latents_std.to(latent)

    def process_in(self, latent: torch.Tensor) -> torch.Tensor:
        """The VAE's latent [B, C, ...] as the model knows it."""
        if self.latents_mean is not None:
            mean, std = self._statistics(latent)
            return (latent - mean) * self.scale_factor / std
        if self.shift_factor is not None:
            latent = latent - self.shift_factor
        return latent * self.scale_factor

    def process_out(self, latent: torch.Tensor) -> torch.Tensor:
        """The model's latent [B, C, ...] as the VAE knows it."""
        if self.latents_mean is not None:
            mean, std = self._statistics(latent)
            return latent * std / self.scale_factor + mean
        latent = latent / self.scale_factor
        return latent if self.shift_factor is None else latent + self.shift_factor


class SD15(LatentFormat):
    """Stable Diffusion 1 and 2. Its scale is given by the caller for models that were trained with another one."""

    taesd_decoder_name = "taesd_decoder"

    def __init__(self, scale_factor: float = 0.18215) -> None:
        super().__init__()
        self.scale_factor = scale_factor


class SDXL(LatentFormat):
    """Stable Diffusion XL; also PixArt-Sigma, HunyuanDiT, AuraFlow."""

    scale_factor = 0.13025
    taesd_decoder_name = "taesdxl_decoder"


class SDXL_Playground_2_5(LatentFormat):  # noqa: N801 (ComfyUI's name)
    """Playground 2.5: SDXL's VAE, normalised by channel to half the standard deviation."""

    scale_factor = 0.5
    taesd_decoder_name = "taesdxl_decoder"


class SD_X4(LatentFormat):  # noqa: N801 (ComfyUI's name)
    """Stable Diffusion x4 upscaler."""

    scale_factor = 0.08333


class SC_Prior(LatentFormat):  # noqa: N801 (ComfyUI's name)
    """Stable Cascade, stage C."""

    latent_channels = 16


class SC_B(LatentFormat):  # noqa: N801 (ComfyUI's name)
    """Stable Cascade, stage B."""

    scale_factor = 1.0 / 0.43


class SD3(LatentFormat):
    """Stable Diffusion 3 and 3.5."""

    latent_channels = 16
    scale_factor = 1.5305
    shift_factor = 0.0609
    taesd_decoder_name = "taesd3_decoder"


class StableAudio1(LatentFormat):
    """Stable Audio."""

    latent_channels = 64
    latent_dimensions = 1


class ACEAudio(LatentFormat):
    """ACE-Step music."""

    latent_channels = 8


class Mochi(LatentFormat):
    """Genmo Mochi."""

    latent_channels = 12
    latent_dimensions = 3


class LTXV(LatentFormat):
    """LTX-Video."""

    latent_channels = 128
    latent_dimensions = 3


class HunyuanVideo(LatentFormat):
    """HunyuanVideo."""

    latent_channels = 16
    latent_dimensions = 3
    scale_factor = 0.476986


class Cosmos1CV8x8x8(LatentFormat):
    """Cosmos 1."""

    latent_channels = 16
    latent_dimensions = 3


class Wan21(LatentFormat):
    """Wan 2.1, Cosmos Predict2, Qwen-Image."""

    latent_channels = 16
    latent_dimensions = 3


class Wan22(LatentFormat):
    """Wan 2.2, the 5B model."""

    latent_channels = 48
    latent_dimensions = 3


class HunyuanImage21(LatentFormat):
    """HunyuanImage 2.1."""

    latent_channels = 64
    scale_factor = 0.75289


class HunyuanImage21Refiner(LatentFormat):
    """The refiner of HunyuanImage 2.1."""

    latent_channels = 64
    latent_dimensions = 3
    scale_factor = 1.03682


class Hunyuan3Dv2(LatentFormat):
    """Hunyuan3D 2."""

    latent_channels = 64
    latent_dimensions = 1
    scale_factor = 0.9990943042622529


class Hunyuan3Dv2_1(LatentFormat):  # noqa: N801 (ComfyUI's name)
    """Hunyuan3D 2.1."""

    latent_channels = 64
    latent_dimensions = 1
    scale_factor = 1.0039506158752403


class Hunyuan3Dv2mini(LatentFormat):
    """Hunyuan3D 2 mini."""

    latent_channels = 64
    latent_dimensions = 1
    scale_factor = 1.0188137142395404


class ChromaRadiance(LatentFormat):
    """Chroma Radiance works on pixels: three channels, red, green and blue."""

    latent_channels = 3

    def __init__(self) -> None:
        super().__init__()
        self.spacial_downscale_ratio = 1

    def process_in(self, latent: Any) -> Any:
        """Pixels stay as they are."""
        return latent

    def process_out(self, latent: Any) -> Any:
        """Pixels stay as they are."""
        return latent


__getattr__ = comfy.families.lookup("latent_formats", __name__, {})
