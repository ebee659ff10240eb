"""TAESD (Ollin Boer Bohan): an autoencoder of a few megabytes that stands in for a VAE in previews.

Weights are stored by position in a sequence: `taesd_decoder.1.weight`, `taesd_encoder.0.weight`, or, in files of one
half, `1.weight`.
"""

from __future__ import annotations

from typing import Any

import torch

import comfy.ops
import comfy.utils

WIDTH = 64


def conv(n_in: int, n_out: int, **kwargs: Any) -> torch.nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    return comfy.ops.disable_weight_init.Conv2d(n_in, n_out, 3, padding=1, **kwargs)


class Clamp(torch.nn.Module):
    """A soft clamp to -3..3."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] -> the same shape."""
        return torch.tanh(x / 3) * 3


class Block(torch.nn.Module):
    """Three convolutions and a skip connection."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        relu = torch.nn.ReLU
        self.conv = torch.nn.Sequential(conv(n_in, n_out), relu(), conv(n_out, n_out), relu(), conv(n_out, n_out))
        self.skip: torch.nn.Module = torch.nn.Identity()
        if n_in != n_out:
            self.skip = comfy.ops.disable_weight_init.Conv2d(n_in, n_out, 1, bias=False)
        self.fuse = relu()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, n_in, h, w] -> [B, n_out, h, w]."""
        return self.fuse(self.conv(x) + self.skip(x))


def _blocks(count: int) -> list[torch.nn.Module]:
    return [Block(WIDTH, WIDTH) for _ in range(count)]


def Encoder(latent_channels: int = 4) -> torch.nn.Sequential:  # noqa: N802 (ComfyUI's name)
    """Pictures [B, 3, 8h, 8w] in 0..1 -> latents [B, C, h, w]."""
    layers: list[torch.nn.Module] = [conv(3, WIDTH), *_blocks(1)]
    for _ in range(3):
        layers += [conv(WIDTH, WIDTH, stride=2, bias=False), *_blocks(3)]
    return torch.nn.Sequential(*layers, conv(WIDTH, latent_channels))


def Decoder(latent_channels: int = 4) -> torch.nn.Sequential:  # noqa: N802 (ComfyUI's name)
    """Latents [B, C, h, w] -> pictures [B, 3, 8h, 8w] in about 0..1."""
    layers: list[torch.nn.Module] = [Clamp(), conv(latent_channels, WIDTH), torch.nn.ReLU()]
    for _ in range(3):
        layers += [*_blocks(3), torch.nn.Upsample(scale_factor=2), conv(WIDTH, WIDTH, bias=False)]
    return torch.nn.Sequential(*layers, *_blocks(1), conv(WIDTH, 3))


class TAESD(torch.nn.Module):
    """Both halves, with the interface of a VAE's network: pictures in -1..1.

    `vae_scale` and `vae_shift` belong to latents as the model knows them; 1 and 0 for latents as the VAE writes them.
    """

    def __init__(self, encoder_path: str | None = None, decoder_path: str | None = None, latent_channels: int = 4):
        super().__init__()
        self.taesd_encoder = Encoder(latent_channels)
        self.taesd_decoder = Decoder(latent_channels)
        self.vae_scale = torch.nn.Parameter(torch.tensor(1.0), requires_grad=False)
        self.vae_shift = torch.nn.Parameter(torch.tensor(0.0), requires_grad=False)
        for half, path in ((self.taesd_encoder, encoder_path), (self.taesd_decoder, decoder_path)):
            if path is not None:
                half.load_state_dict(comfy.utils.load_torch_file(path, safe_load=True))

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, h, w] -> pictures [B, 3, 8h, 8w] in about -1..1."""
        return self.taesd_decoder((x - self.vae_shift) * self.vae_scale) * 2 - 1

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures [B, 3, H, W] in -1..1 -> latents [B, C, H/8, W/8]."""
        return self.taesd_encoder(x * 0.5 + 0.5) / self.vae_scale + self.vae_shift
