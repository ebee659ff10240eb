"""The image VAE with latent diffusion's keys, whose sizes are read from the file, and which network a file belongs to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import comfy.ops
from comfy.ldm.modules.diffusionmodules.model import Decoder, Encoder
from comfy.taesd.taesd import TAESD

StateDict = dict[str, torch.Tensor]


class AutoencoderKL(nn.Module):
    """KL-regularised autoencoder (Kingma & Welling 2013); `encode` gives the mean, so that ranks agree."""

    def __init__(self, ddconfig: dict[str, Any], embed_dim: int | None = None) -> None:
        super().__init__()
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.embed_dim = embed_dim
        if embed_dim is not None:
            conv = comfy.ops.manual_cast.Conv2d
            self.quant_conv = conv(2 * ddconfig["z_channels"], 2 * embed_dim, kernel_size=1)
            self.post_quant_conv = conv(embed_dim, ddconfig["z_channels"], kernel_size=1)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Picture [B, 3, H, W] in -1..1 -> mean latent [B, C, H / f, W / f]."""
        moments = self.encoder(x)
        if self.embed_dim is not None:
            moments = self.quant_conv(moments)
        return moments.chunk(2, dim=1)[0]

    def decode(self, z: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Latent [B, C, h, w] -> picture [B, 3, h * f, w * f] in about -1..1."""
        if self.embed_dim is not None:
            z = self.post_quant_conv(z)
        return self.decoder(z, **kwargs)


class PixelSpace(nn.Module):
    """No VAE at all, for networks that denoise pixels: the latent is the picture, in -1..1."""

    def __init__(self) -> None:
        super().__init__()
        self.pixel_space_vae = nn.Parameter(torch.tensor(1.0), requires_grad=False)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Picture [B, 3, H, W] -> the same."""
        return x

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Picture [B, 3, H, W] -> the same."""
        return z


@dataclass(frozen=True)
class ImageNetwork:
    """The network of an image VAE's file.

    `factor`: pixels per latent cell and side. `dtype`: in which it must compute, None for the device's usual one.
    `activations`: memory it needs per pixel, compared with AutoencoderKL.
    """

    make: Callable[[], nn.Module]
    latent_channels: int
    out_channels: int
    factor: int
    dtype: torch.dtype | None = None
    activations: float = 1.0


def image_network(sd: StateDict) -> ImageNetwork:
    """The network for an image VAE's weights. Raises ValueError when the keys are those of none."""
    if "pixel_space_vae" in sd:
        return ImageNetwork(PixelSpace, 3, 3, 1, torch.float32, 0.02)
    if "taesd_decoder.1.weight" in sd:
        channels = sd["taesd_decoder.1.weight"].shape[1]
        return ImageNetwork(lambda: TAESD(latent_channels=channels), channels, 3, 8, activations=0.15)
    ddconfig, embed_dim = config_from_state_dict(sd)
    return ImageNetwork(
        lambda: AutoencoderKL(ddconfig, embed_dim),
        embed_dim or ddconfig["z_channels"],
        ddconfig["out_ch"],
        2 ** (len(ddconfig["ch_mult"]) - 1),
    )


def config_from_state_dict(sd: StateDict) -> tuple[dict[str, Any], int | None]:
    """(`ddconfig`, size of the quantised latent or None) of an image VAE's weights.

    Raises ValueError when the keys are not those of such a VAE.
    """
    if "decoder.conv_in.weight" not in sd or "encoder.conv_in.weight" not in sd:
        raise ValueError("this is not an image VAE: encoder.conv_in.weight or decoder.conv_in.weight is missing")
    base, in_channels = sd["encoder.conv_in.weight"].shape[:2]
    mult: list[int] = []
    while f"encoder.down.{len(mult)}.block.0.conv1.weight" in sd:
        mult.append(sd[f"encoder.down.{len(mult)}.block.0.conv1.weight"].shape[0] // base)
    blocks = 0
    while f"encoder.down.0.block.{blocks}.conv1.weight" in sd:
        blocks += 1
    config = {
        "ch": base,
        "ch_mult": mult,
        "num_res_blocks": blocks,
        "in_channels": in_channels,
        "out_ch": sd["decoder.conv_out.weight"].shape[0],
        "z_channels": sd["decoder.conv_in.weight"].shape[1],
        "double_z": True,
    }
    quant = sd.get("post_quant_conv.weight")
    return config, None if quant is None else quant.shape[1]


_RENAMED = (
    ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.resnets.1.", "mid.block_2."),
    ("mid_block.attentions.0.", "mid.attn_1."),
    ("conv_norm_out.", "norm_out."),
    ("conv_shortcut.", "nin_shortcut."),
)
_ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",
}  # fmt: skip


def convert_diffusers_vae(sd: StateDict) -> StateDict:
    """Diffusers' names of an image VAE -> latent diffusion's; linears of attention become 1x1 convolutions."""
    levels = 1 + max(int(key.split(".")[2]) for key in sd if key.startswith("decoder.up_blocks."))
    out = {}
    for key, value in sd.items():
        name = key
        for theirs, ours in _RENAMED:
            name = name.replace(theirs, ours)
        parts = name.split(".")
        if len(parts) > 4 and parts[1] in ("down_blocks", "up_blocks"):
            level = int(parts[2]) if parts[1] == "down_blocks" else levels - 1 - int(parts[2])
            kind = {"resnets": f"block.{parts[4]}", "downsamplers": "downsample", "upsamplers": "upsample"}[parts[3]]
            name = ".".join([parts[0], parts[1].removesuffix("_blocks"), str(level), kind, *parts[5:]])
        elif ".mid.attn_1." in name:
            head, _, tail = name.partition(".mid.attn_1.")
            layer, _, suffix = tail.rpartition(".")
            name = f"{head}.mid.attn_1.{_ATTENTION.get(layer, layer)}.{suffix}"
            if value.ndim == 2:
                value = value[:, :, None, None]
        out[name] = value
    return out
