"""What `comfy.vae.VAE` knows of the VAE of pictures whose weights it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from comfy.ldm.models.autoencoder import AutoencoderKL, config_from_state_dict

_HALF = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class ImageFormat:
    """A kind of image VAE.

    make: the network, without weights. space: pixels a cell and side. encode_bytes, decode_bytes: activations per pixel and
    byte of the dtype.
    """

    make: Callable[[], torch.nn.Module]
    latent_channels: int
    out_channels: int
    space: int
    encode_bytes: float = 1767  # both measured on the 84M-parameter image VAE
    decode_bytes: float = 2178
    working_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)


def _folding(sd: dict[str, torch.Tensor]) -> ImageFormat | None:
    if "decoder.up.0.upsample.conv.weight" not in sd:
        return None
    from comfy.ldm.hunyuan_video import folding_vae as vae

    config = vae.config_from_state_dict(sd)
    if config is None:
        return None
    space = 2 ** (len(config["down"]) - 1)
    # as ComfyUI estimates them
    return ImageFormat(lambda: vae.FoldingVAE(config), config["z"], 3, space, 700, 700, _HALF)


def find(sd: dict[str, torch.Tensor]) -> ImageFormat:
    """The kind of image VAE that these weights are of.

    Raises ValueError when they are not those of an image VAE.
    """
    kind = _folding(sd)
    if kind is not None:
        return kind
    config, embed_dim = config_from_state_dict(sd)
    space = 2 ** (len(config["ch_mult"]) - 1)
    channels = embed_dim or config["z_channels"]
    return ImageFormat(lambda: AutoencoderKL(config, embed_dim), channels, config["out_ch"], space)
