"""What nodes of Wan have in common.

Pictures are [T, H, W, 3] in 0..1; latents [B, C, F, h, w] with F = (length - 1) / 4 + 1.
"""

from __future__ import annotations

from typing import Any

import torch

import comfy.latent_formats
import comfy.model_management
import node_helpers
from comfy_api.latest import io
from comfy_nodes.fields import MAX_RESOLUTION
from comfy_nodes.image import scaled
from comfy_nodes.v3 import batch, side

FRAMES = 2  # axis of [B, C, T, H, W]
GREY = 0.5
CELL = 8


def video_inputs(width: int = 832, height: int = 480, length: int = 81, step: int = 16) -> list[Any]:
    """Size and length of the video, and how many at once."""
    frames = io.Int.Input("length", default=length, min=1, max=MAX_RESOLUTION, step=4)
    return [side("width", width, low=step, step=step), side("height", height, low=step, step=step), frames, batch()]


def conditionings(*more: Any) -> list[Any]:
    """Both prompts, the VAE, and other inputs."""
    both = [io.Conditioning.Input("positive"), io.Conditioning.Input("negative")]
    return [*both, io.Vae.Input("vae"), *more]


VISION = io.ClipVisionOutput.Input("clip_vision_output", optional=True)
THREE = [io.Conditioning.Output(display_name="positive"), io.Conditioning.Output(display_name="negative")]
THREE.append(io.Latent.Output(display_name="latent"))


def picture(name: str) -> Any:
    return io.Image.Input(name, optional=True)


def schema(cls: Any, inputs: list[Any], outputs: list[Any] | None = None, experimental: bool = False) -> io.Schema:
    """A node of category `conditioning/video_models`."""
    outputs = THREE if outputs is None else outputs
    return io.Schema(
        node_id=cls.__name__, category="conditioning/video_models", inputs=inputs, outputs=outputs,
        is_experimental=experimental,
    )  # fmt: skip


def latent_frames(length: int) -> int:
    return (length - 1) // 4 + 1


def empty(channels: int, width: int, height: int, length: int, count: int, cell: int = CELL) -> torch.Tensor:
    """A latent of zeros."""
    shape = [count, channels, latent_frames(length), height // cell, width // cell]
    return torch.zeros(shape, device=comfy.model_management.intermediate_device())


def nothing(like: torch.Tensor) -> torch.Tensor:
    """The VAE's latent that the model sees as zeros, in the shape of `like`."""
    kind = comfy.latent_formats.Wan22 if like.shape[1] == 48 else comfy.latent_formats.Wan21
    return kind().process_out(torch.zeros_like(like))


def resized(images: torch.Tensor, width: int, height: int, method: str = "bilinear") -> torch.Tensor:
    """Frames in the video's size, cut about the centre."""
    return scaled(images, width, height, method, "center")


def both(positive: Any, negative: Any, values: dict[str, Any], append: bool = False) -> tuple[Any, Any]:
    """Values set in both conditionings."""
    first, second = (node_helpers.conditioning_set_values(c, values, append=append) for c in (positive, negative))
    return first, second


def with_vision(positive: Any, negative: Any, vision: Any) -> tuple[Any, Any]:
    """What CLIP saw, if anything."""
    return (positive, negative) if vision is None else both(positive, negative, {"clip_vision_output": vision})


def put(target: torch.Tensor, part: torch.Tensor, channel: int = 0) -> None:
    """Write a latent's frames over the first frames of `target`, from a channel on."""
    frames = min(target.shape[FRAMES], part.shape[FRAMES])
    target[:, channel : channel + part.shape[1], :frames] = part[:, :, :frames]


def by_four(mask: torch.Tensor) -> torch.Tensor:
    """A mask of frames [1, 1, 4 F, h, w] as four channels [1, 4, F, h, w]."""
    return mask.reshape(1, mask.shape[2] // 4, 4, *mask.shape[3:]).transpose(1, 2)
