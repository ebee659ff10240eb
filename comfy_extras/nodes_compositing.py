"""Pictures with transparency. Masks are 1 where a picture is transparent."""

from __future__ import annotations

from collections.abc import Callable

import torch

import comfy.utils
from comfy_api.latest import io
from comfy_nodes.image import scaled
from comfy_nodes.v3 import extension

Pair = tuple[torch.Tensor, torch.Tensor]
COMPOSITING = "mask/compositing"


def _both(sa: torch.Tensor, da: torch.Tensor) -> torch.Tensor:
    return sa + da - sa * da


# source colour and alpha, destination colour and alpha (colours multiplied by alpha) -> the composite's (Porter and Duff
# 1984; the blend modes as in the W3C compositing recommendation)
MODES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], Pair]] = {
    "ADD": lambda s, sa, d, da: ((s + d).clamp(0, 1), (sa + da).clamp(0, 1)),
    "CLEAR": lambda s, sa, d, da: (torch.zeros_like(d), torch.zeros_like(da)),
    "DARKEN": lambda s, sa, d, da: ((1 - da) * s + (1 - sa) * d + torch.minimum(s, d), _both(sa, da)),
    "DST": lambda s, sa, d, da: (d, da),
    "DST_ATOP": lambda s, sa, d, da: (sa * d + (1 - da) * s, sa),
    "DST_IN": lambda s, sa, d, da: (d * sa, sa * da),
    "DST_OUT": lambda s, sa, d, da: ((1 - sa) * d, (1 - sa) * da),
    "DST_OVER": lambda s, sa, d, da: (d + (1 - da) * s, da + (1 - da) * sa),
    "LIGHTEN": lambda s, sa, d, da: ((1 - da) * s + (1 - sa) * d + torch.maximum(s, d), _both(sa, da)),
    "MULTIPLY": lambda s, sa, d, da: (s * d, sa * da),
    "OVERLAY": lambda s, sa, d, da: (
        torch.where(2 * d < da, 2 * s * d, sa * da - 2 * (da - s) * (sa - d)),
        _both(sa, da),
    ),
    "SCREEN": lambda s, sa, d, da: (s + d - s * d, _both(sa, da)),
    "SRC": lambda s, sa, d, da: (s, sa),
    "SRC_ATOP": lambda s, sa, d, da: (da * s + (1 - sa) * d, da),
    "SRC_IN": lambda s, sa, d, da: (s * da, sa * da),
    "SRC_OUT": lambda s, sa, d, da: ((1 - da) * s, (1 - da) * sa),
    "SRC_OVER": lambda s, sa, d, da: (s + (1 - sa) * d, sa + (1 - sa) * da),
    "XOR": lambda s, sa, d, da: ((1 - da) * s + (1 - sa) * d, (1 - da) * sa + (1 - sa) * da),
}


def composite(source: Pair, destination: Pair, mode: str) -> Pair:
    """Picture [B, H, W, 3] and mask [B, H, W] of the composite."""
    (s, s_mask), (d, d_mask) = source, destination
    sa, da = (1 - mask.unsqueeze(-1) for mask in (s_mask, d_mask))
    colour, alpha = MODES[mode](s * sa, sa, d * da, da)
    colour = torch.where(alpha > 1e-5, colour / alpha, torch.zeros_like(colour)).clamp(0, 1)
    return colour, 1 - alpha.squeeze(-1)


def sized_mask(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """A mask [B, H, W] scaled to a size."""
    if mask.shape[-2:] == (height, width):
        return mask.reshape((-1, height, width))
    flat = mask.reshape((-1, 1, *mask.shape[-2:]))
    return torch.nn.functional.interpolate(flat, size=(height, width), mode="bilinear").squeeze(1)


class PorterDuffImageComposite(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PorterDuffImageComposite",
            display_name="Porter-Duff Image Composite",
            category=COMPOSITING,
            inputs=[
                io.Image.Input("source"),
                io.Mask.Input("source_alpha"),
                io.Image.Input("destination"),
                io.Mask.Input("destination_alpha"),
                io.Combo.Input("mode", options=list(MODES), default="DST"),
            ],
            outputs=[io.Image.Output(), io.Mask.Output()],
        )

    @classmethod
    def execute(
        cls,
        source: torch.Tensor,
        source_alpha: torch.Tensor,
        destination: torch.Tensor,
        destination_alpha: torch.Tensor,
        mode: str,
    ):
        """Everything is brought to the destination's size; as many pictures come out as the shortest input has."""
        height, width = destination.shape[1:3]
        if source.shape[1:3] != destination.shape[1:3]:
            source = scaled(source, width, height, "bicubic", "center")
        masks = [sized_mask(mask, height, width) for mask in (source_alpha, destination_alpha)]
        count = min(len(part) for part in (source, destination, *masks))
        first, second = (source[:count, ..., :3], masks[0][:count]), (destination[:count, ..., :3], masks[1][:count])
        return io.NodeOutput(*composite(first, second, mode))

    composite = execute


class SplitImageWithAlpha(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SplitImageWithAlpha",
            display_name="Split Image with Alpha",
            category=COMPOSITING,
            inputs=[io.Image.Input("image")],
            outputs=[io.Image.Output(), io.Mask.Output()],
        )

    @classmethod
    def execute(cls, image: torch.Tensor):
        alpha = image[..., 3] if image.shape[-1] > 3 else torch.ones_like(image[..., 0])
        return io.NodeOutput(image[..., :3], 1.0 - alpha)

    split_image_with_alpha = execute


class JoinImageWithAlpha(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="JoinImageWithAlpha",
            display_name="Join Image with Alpha",
            category=COMPOSITING,
            inputs=[io.Image.Input("image"), io.Mask.Input("alpha")],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, alpha: torch.Tensor):
        """[B, H, W, 4]; the shorter batch is repeated."""
        count = max(len(image), len(alpha))
        opaque = 1.0 - sized_mask(alpha, *image.shape[1:3])
        image, opaque = (comfy.utils.repeat_to_batch_size(part, count) for part in (image, opaque))
        return io.NodeOutput(torch.cat((image[..., :3], opaque.unsqueeze(-1)), dim=-1))

    join_image_with_alpha = execute


comfy_entrypoint = extension(PorterDuffImageComposite, SplitImageWithAlpha, JoinImageWithAlpha)
