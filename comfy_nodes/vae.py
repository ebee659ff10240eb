"""Between pictures and latents. Images are [B, H, W, 3] in 0..1, masks [B, H, W] with 1 where to repaint."""

from __future__ import annotations

import math
from typing import Any

import torch

import node_helpers
from comfy_nodes.fields import whole

TEMPORAL = {
    "temporal_size": whole(64, 8, 4096, 4, tooltip="Only used for video VAEs: frames per tile."),
    "temporal_overlap": whole(8, 4, 4096, 4, tooltip="Only used for video VAEs: frames tiles share."),
}


def need_vae(vae: Any) -> None:
    """Raises RuntimeError when there is no VAE."""
    if vae is None:
        raise RuntimeError("vae input is missing: the checkpoint holds no VAE; load one with the Load VAE node")


def as_images(decoded: torch.Tensor) -> torch.Tensor:
    """Frames of a video [B, T, H, W, C] as a batch of images."""
    return decoded.reshape(-1, *decoded.shape[-3:]) if decoded.ndim == 5 else decoded


class VAEDecode:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "samples": ("LATENT", {"tooltip": "The latent to be decoded."}),
                "vae": ("VAE", {"tooltip": "The VAE that decodes it."}),
            }
        }

    RETURN_TYPES = ("IMAGE",)
    OUTPUT_TOOLTIPS = ("The decoded picture.",)
    FUNCTION = "decode"
    CATEGORY = "latent"
    DESCRIPTION = "Decodes latent images back into pixels."

    def decode(self, vae: Any, samples: dict[str, Any]):
        need_vae(vae)
        return (as_images(vae.decode(samples["samples"])),)


class VAEDecodeTiled:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "samples": ("LATENT",),
                "vae": ("VAE",),
                "tile_size": whole(512, 64, 4096, 32),
                "overlap": whole(64, 0, 4096, 32),
                **TEMPORAL,
            }
        }

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "decode"
    CATEGORY = "_for_testing"

    def decode(
        self,
        vae: Any,
        samples: dict[str, Any],
        tile_size: int,
        overlap: int = 64,
        temporal_size: int = 64,
        temporal_overlap: int = 8,
    ):
        """Sizes are in pixels and frames of the result; overlaps too large for their tile are reduced."""
        need_vae(vae)
        if overlap * 4 > tile_size:
            overlap = tile_size // 4
        if temporal_overlap * 2 > temporal_size:
            temporal_overlap //= 2
        frames = vae.temporal_compression_decode()
        tile_t = overlap_t = None
        if frames is not None:
            tile_t = max(2, temporal_size // frames)
            overlap_t = max(1, min(tile_t // 2, temporal_overlap // frames))
        cell = vae.spacial_compression_decode()
        decoded = vae.decode_tiled(
            samples["samples"],
            tile_x=tile_size // cell,
            tile_y=tile_size // cell,
            overlap=overlap // cell,
            tile_t=tile_t,
            overlap_t=overlap_t,
        )
        return (as_images(decoded),)


class VAEEncode:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"pixels": ("IMAGE",), "vae": ("VAE",)}}

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "encode"
    CATEGORY = "latent"

    def encode(self, vae: Any, pixels: torch.Tensor):
        need_vae(vae)
        return ({"samples": vae.encode(pixels[..., :3])},)


class VAEEncodeTiled:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "pixels": ("IMAGE",),
                "vae": ("VAE",),
                "tile_size": whole(512, 64, 4096, 64),
                "overlap": whole(64, 0, 4096, 32),
                **TEMPORAL,
            }
        }

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "encode"
    CATEGORY = "_for_testing"

    def encode(
        self,
        vae: Any,
        pixels: torch.Tensor,
        tile_size: int,
        overlap: int,
        temporal_size: int = 64,
        temporal_overlap: int = 8,
    ):
        need_vae(vae)
        encoded = vae.encode_tiled(
            pixels[..., :3],
            tile_x=tile_size,
            tile_y=tile_size,
            overlap=overlap,
            tile_t=temporal_size,
            overlap_t=temporal_overlap,
        )
        return ({"samples": encoded},)


def _cropped(pixels: torch.Tensor, mask: torch.Tensor, cell: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and mask [b, 1, H, W] cut centrally to multiples of `cell`; the mask is first brought to the image's size."""
    mask = torch.nn.functional.interpolate(
        mask.reshape((-1, 1, mask.shape[-2], mask.shape[-1])), size=pixels.shape[1:3], mode="bilinear"
    )
    rows, columns = (side // cell * cell for side in pixels.shape[1:3])
    top, left = (pixels.shape[1] % cell) // 2, (pixels.shape[2] % cell) // 2
    window = (slice(top, top + rows), slice(left, left + columns))
    return pixels[:, window[0], window[1]], mask[:, :, window[0], window[1]]


def _greyed(pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The image with middle grey where the mask is set."""
    keep = (1.0 - mask.round()).squeeze(1)[..., None]
    return (pixels[..., :3] - 0.5) * keep + 0.5


class VAEEncodeForInpaint:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "pixels": ("IMAGE",),
                "vae": ("VAE",),
                "mask": ("MASK",),
                "grow_mask_by": whole(6, 0, 64, 1),
            }
        }

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "encode"
    CATEGORY = "latent/inpaint"

    def encode(self, vae: Any, pixels: torch.Tensor, mask: torch.Tensor, grow_mask_by: int = 6):
        """The masked part is grey for the VAE; the noise mask is grown by about `grow_mask_by` pixels."""
        need_vae(vae)
        pixels, mask = _cropped(pixels, mask, vae.spacial_compression_encode())
        grown = mask
        if grow_mask_by > 0:
            kernel = torch.ones((1, 1, grow_mask_by, grow_mask_by), dtype=mask.dtype, device=mask.device)
            padding = math.ceil((grow_mask_by - 1) / 2)
            grown = torch.nn.functional.conv2d(mask.round(), kernel, padding=padding).clamp(0, 1)
        grown = grown[:, :, : mask.shape[2], : mask.shape[3]].round()
        return ({"samples": vae.encode(_greyed(pixels, mask)), "noise_mask": grown},)


class InpaintModelConditioning:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "vae": ("VAE",),
                "pixels": ("IMAGE",),
                "mask": ("MASK",),
                "noise_mask": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "Sample only inside the mask; the rest stays exactly as it is."},
                ),
            }
        }

    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT")
    RETURN_NAMES = ("positive", "negative", "latent")
    FUNCTION = "encode"
    CATEGORY = "conditioning/inpaint"

    def encode(
        self, positive: Any, negative: Any, pixels: torch.Tensor, vae: Any, mask: torch.Tensor, noise_mask: bool = True
    ):
        need_vae(vae)
        latent: dict[str, Any] = {"samples": vae.encode(pixels[..., :3])}  # the VAE crops by its own rule
        pixels, mask = _cropped(pixels, mask, vae.spacial_compression_encode())
        if noise_mask:
            latent["noise_mask"] = mask
        values = {"concat_latent_image": vae.encode(_greyed(pixels, mask)), "concat_mask": mask}
        return (
            node_helpers.conditioning_set_values(positive, values),
            node_helpers.conditioning_set_values(negative, values),
            latent,
        )


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls
    for cls in (
        VAEDecode,
        VAEDecodeTiled,
        VAEEncode,
        VAEEncodeTiled,
        VAEEncodeForInpaint,
        InpaintModelConditioning,
    )
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "VAEDecode": "VAE Decode",
    "VAEDecodeTiled": "VAE Decode (Tiled)",
    "VAEEncode": "VAE Encode",
    "VAEEncodeTiled": "VAE Encode (Tiled)",
    "VAEEncodeForInpaint": "VAE Encode (for Inpainting)",
}
