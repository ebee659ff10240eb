"""Nodes of Wan 2.1 and 2.2: what a video begins from, is controlled by, and is made for.

Pictures are [T, H, W, 3] in 0..1; latents [B, C, F, h, w] with F = (length - 1) / 4 + 1.
"""

from __future__ import annotations

import types
from typing import Any

import torch

import node_helpers
from comfy_api.latest import io
from comfy_nodes.v3 import extension, share
from comfy_nodes.vae import need_vae
from comfy_nodes.wan import (
    CELL,
    FRAMES,
    GREY,
    THREE,
    VISION,
    both,
    by_four,
    conditionings,
    empty,
    latent_frames,
    nothing,
    picture,
    put,
    resized,
    schema,
    video_inputs,
    with_vision,
)
from comfy_nodes.wan_motion import WanAnimateToVideo, WanTrackToVideo
from comfy_nodes.wan_sound import WanHuMoImageToVideo, WanSoundImageToVideo, WanSoundImageToVideoExtend

MOST_FRAMES = 99999


class WanImageToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(cls, conditionings(*video_inputs(), VISION, picture("start_image")))

    @classmethod
    def execute(
        cls, positive: Any, negative: Any, vae: Any, width: int, height: int, length: int, batch_size: int,
        start_image: torch.Tensor | None = None, clip_vision_output: Any = None,
    ):  # fmt: skip
        """The video continues `start_image`; what is not known is grey."""
        latent = empty(16, width, height, length, batch_size)
        if start_image is not None:
            need_vae(vae)
            start = resized(start_image[:length], width, height)[..., :3]
            video = start.new_full((length, height, width, 3), GREY)
            video[: start.shape[0]] = start
            known = vae.encode(video)
            mask = known.new_ones((1, 1, latent.shape[2], *known.shape[-2:]))
            mask[:, :, : latent_frames(start.shape[0])] = 0.0
            positive, negative = both(positive, negative, {"concat_latent_image": known, "concat_mask": mask})
        positive, negative = with_vision(positive, negative, clip_vision_output)
        return io.NodeOutput(positive, negative, {"samples": latent})


def between(
    positive: Any, negative: Any, vae: Any, size: tuple[int, int, int, int], start: torch.Tensor | None,
    end: torch.Tensor | None, vision: Any,
) -> io.NodeOutput:  # fmt: skip
    """A video of size (width, height, length, batch) from first frames to last frames."""
    need_vae(vae)
    width, height, length, count = size
    latent = empty(16, width, height, length, count)
    video = torch.full((length, height, width, 3), GREY)
    mask = torch.ones((1, 1, latent.shape[2] * 4, *latent.shape[-2:]))
    if start is not None:
        first = resized(start[:length], width, height)[..., :3]
        video[: first.shape[0]] = first
        mask[:, :, : first.shape[0] + 3] = 0.0
    if end is not None:
        last = resized(end[-length:], width, height)[..., :3]
        video[-last.shape[0] :] = last
        mask[:, :, -last.shape[0] :] = 0.0
    values = {"concat_latent_image": vae.encode(video), "concat_mask": by_four(mask)}
    positive, negative = with_vision(*both(positive, negative, values), vision)
    return io.NodeOutput(positive, negative, {"samples": latent})


class WanFirstLastFrameToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        seen = [io.ClipVisionOutput.Input(f"clip_vision_{name}_image", optional=True) for name in ("start", "end")]
        inputs = [*video_inputs(), *seen, picture("start_image"), picture("end_image")]
        return schema(cls, conditionings(*inputs))

    @classmethod
    def execute(
        cls, positive: Any, negative: Any, vae: Any, width: int, height: int, length: int, batch_size: int,
        start_image: torch.Tensor | None = None, end_image: torch.Tensor | None = None,
        clip_vision_start_image: Any = None, clip_vision_end_image: Any = None,
    ):  # fmt: skip
        seen = [vision for vision in (clip_vision_start_image, clip_vision_end_image) if vision is not None]
        vision = seen[0] if seen else None
        if len(seen) == 2:
            states = torch.cat([each.penultimate_hidden_states for each in seen], dim=-2)
            vision = types.SimpleNamespace(penultimate_hidden_states=states)
        return between(positive, negative, vae, (width, height, length, batch_size), start_image, end_image, vision)


class WanFunInpaintToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        inputs = [*video_inputs(), VISION, picture("start_image"), picture("end_image")]
        return schema(cls, conditionings(*inputs))

    @classmethod
    def execute(
        cls, positive: Any, negative: Any, vae: Any, width: int, height: int, length: int, batch_size: int,
        start_image: torch.Tensor | None = None, end_image: torch.Tensor | None = None, clip_vision_output: Any = None,
    ):  # fmt: skip
        size = (width, height, length, batch_size)
        return between(positive, negative, vae, size, start_image, end_image, clip_vision_output)


class WanFunControlToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        inputs = [*video_inputs(), VISION, picture("start_image"), picture("control_video")]
        return schema(cls, conditionings(*inputs))

    @classmethod
    def execute(
        cls, positive: Any, negative: Any, vae: Any, width: int, height: int, length: int, batch_size: int,
        start_image: torch.Tensor | None = None, clip_vision_output: Any = None, control_video: torch.Tensor | None = None,
    ):  # fmt: skip
        latent = empty(16, width, height, length, batch_size)
        known = nothing(latent[:1]).repeat(1, 2, 1, 1, 1)
        for images, channel in ((control_video, 0), (start_image, 16)):
            if images is not None:
                need_vae(vae)
                put(known, vae.encode(resized(images[:length], width, height)[..., :3]), channel)
        positive, negative = both(positive, negative, {"concat_latent_image": known})
        positive, negative = with_vision(positive, negative, clip_vision_output)
        return io.NodeOutput(positive, negative, {"samples": latent})


class Wan22FunControlToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        inputs = [*video_inputs(), picture("ref_image"), picture("control_video")]
        return schema(cls, conditionings(*inputs))

    @classmethod
    def execute(
        cls, positive: Any, negative: Any, vae: Any, width: int, height: int, length: int, batch_size: int,
        ref_image: torch.Tensor | None = None, control_video: torch.Tensor | None = None,
    ):  # fmt: skip
        need_vae(vae)
        channels = vae.latent_channels
        latent = empty(channels, width, height, length, batch_size, vae.spacial_compression_encode())
        known = nothing(latent[:1]).repeat(1, 2, 1, 1, 1)
        mask = known.new_ones((1, 1, latent.shape[2] * 4, *latent.shape[-2:]))
        if ref_image is not None:
            reference = vae.encode(resized(ref_image[:1], width, height)[..., :3])
            positive, negative = both(positive, negative, {"reference_latents": [reference]}, append=True)
        if control_video is not None:
            put(known, vae.encode(resized(control_video[:length], width, height)[..., :3]))
        values = {"concat_latent_image": known, "concat_mask": by_four(mask), "concat_mask_index": channels}
        positive, negative = both(positive, negative, values)
        return io.NodeOutput(positive, negative, {"samples": latent})


def filled(frames: torch.Tensor, length: int, value: float) -> torch.Tensor:
    """Frames [n, H, W, C] followed by ones of `value` up to `length`."""
    missing = length - frames.shape[0]
    return torch.nn.functional.pad(frames, (0, 0, 0, 0, 0, 0, 0, max(0, missing)), value=value)


def vace_controls(
    vae: Any, size: tuple[int, int, int], video: torch.Tensor | None, masks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What stays and what changes as latents [1, 32, F, h, w], and where, [64, F, h, w]; size (width, height, length)."""
    width, height, length = size
    if video is None:
        video = torch.full((length, height, width, 3), GREY)
    else:
        video = filled(resized(video[:length], width, height)[..., :3], length, GREY)
    if masks is None:
        mask = torch.ones((length, height, width, 1))
    else:
        mask = masks.unsqueeze(-1) if masks.ndim == 3 else masks.movedim(1, -1)
        mask = filled(resized(mask[:length], width, height), length, 1.0)
    centred = video - GREY
    parts = [vae.encode(centred * share + GREY) for share in (1 - mask, mask)]
    cells = mask.reshape(length, height // CELL, CELL, width // CELL, CELL).permute(2, 4, 0, 1, 3).flatten(0, 1)
    wanted = (latent_frames(length), height // CELL, width // CELL)
    places = torch.nn.functional.interpolate(cells.unsqueeze(0), size=wanted, mode="nearest-exact").squeeze(0)
    return torch.cat(parts, dim=1), places


class WanVaceToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        strength = share("strength", 1.0, high=1000.0)
        masks = io.Mask.Input("control_masks", optional=True)
        inputs = [*video_inputs(), strength, picture("control_video"), masks, picture("reference_image")]
        return schema(cls, conditionings(*inputs), [*THREE, io.Int.Output(display_name="trim_latent")])

    @classmethod
    def execute(
        cls, positive: Any, negative: Any, vae: Any, width: int, height: int, length: int, batch_size: int,
        strength: float, control_video: torch.Tensor | None = None, control_masks: torch.Tensor | None = None,
        reference_image: torch.Tensor | None = None,
    ):  # fmt: skip
        """Nodes in a row control together. `trim_latent`: frames of the reference, in front of the video."""
        need_vae(vae)
        control, places = vace_controls(vae, (width, height, length), control_video, control_masks)
        trim = 0
        if reference_image is not None:
            reference = vae.encode(resized(reference_image[:1], width, height)[..., :3])
            reference = torch.cat((reference, nothing(reference)), dim=1)
            trim = reference.shape[2]
            control = torch.cat((reference, control), dim=2)
            places = torch.cat((torch.zeros_like(places[:, :trim]), places), dim=1)
        values = {"vace_frames": [control], "vace_mask": [places.unsqueeze(0)], "vace_strength": [strength]}
        positive, negative = both(positive, negative, values, append=True)
        latent = empty(16, width, height, length, batch_size)
        latent = torch.cat((latent.new_zeros((*latent.shape[:2], trim, *latent.shape[3:])), latent), dim=2)
        return io.NodeOutput(positive, negative, {"samples": latent}, trim)


class WanCameraImageToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        path = io.WanCameraEmbedding.Input("camera_conditions", optional=True)
        return schema(cls, conditionings(*video_inputs(), VISION, picture("start_image"), path))

    @classmethod
    def execute(
        cls, positive: Any, negative: Any, vae: Any, width: int, height: int, length: int, batch_size: int,
        start_image: torch.Tensor | None = None, camera_conditions: Any = None, clip_vision_output: Any = None,
    ):  # fmt: skip
        latent = empty(16, width, height, length, batch_size)
        if start_image is not None:
            need_vae(vae)
            known = nothing(latent[:1])
            start = resized(start_image[:length], width, height)[..., :3]
            put(known, vae.encode(start))
            mask = known.new_ones((1, 1, latent.shape[2] * 4, *latent.shape[-2:]))
            mask[:, :, : start.shape[0] + 3] = 0.0
            values = {"concat_latent_image": known, "concat_mask": by_four(mask)}
            positive, negative = both(positive, negative, values)
        if camera_conditions is not None:
            positive, negative = both(positive, negative, {"camera_conditions": camera_conditions})
        positive, negative = with_vision(positive, negative, clip_vision_output)
        return io.NodeOutput(positive, negative, {"samples": latent})


class WanPhantomSubjectToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = ("positive", "negative_text", "negative_img_text")
        outputs = [io.Conditioning.Output(display_name=name) for name in names]
        outputs.append(io.Latent.Output(display_name="latent"))
        return schema(cls, conditionings(*video_inputs(), picture("images")), outputs)

    @classmethod
    def execute(
        cls, positive: Any, negative: Any, vae: Any, width: int, height: int, length: int, batch_size: int,
        images: torch.Tensor | None = None,
    ):  # fmt: skip
        """Pictures of subjects are frames after the video; the second negative prompt goes without them."""
        latent, without = empty(16, width, height, length, batch_size), negative
        if images is not None:
            need_vae(vae)
            each = [vae.encode(one[..., :3]) for one in resized(images[:length], width, height).split(1)]
            subjects = torch.cat(each, dim=FRAMES)
            without = node_helpers.conditioning_set_values(negative, {"time_dim_concat": nothing(subjects)})
            positive, negative = both(positive, negative, {"time_dim_concat": subjects})
        return io.NodeOutput(positive, negative, without, {"samples": latent})


class Wan22ImageToVideoLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        inputs = [io.Vae.Input("vae"), *video_inputs(1280, 704, 49, step=32), picture("start_image")]
        return io.Schema(
            node_id=cls.__name__, category="conditioning/inpaint", inputs=inputs, outputs=[io.Latent.Output()]
        )

    @classmethod
    def execute(
        cls, vae: Any, width: int, height: int, length: int, batch_size: int, start_image: torch.Tensor | None = None
    ):
        """The first frames are known, which the noise mask says."""
        latent = empty(48, width, height, length, batch_size, 16)
        if start_image is None:
            return io.NodeOutput({"samples": latent})
        need_vae(vae)
        start = vae.encode(resized(start_image[:length], width, height)[..., :3])
        known, mask = nothing(latent[:1]), latent.new_ones((1, 1, *latent.shape[2:]))
        put(known, start)
        mask[:, :, : start.shape[FRAMES]] = 0.0
        repeats = (batch_size, 1, 1, 1, 1)
        return io.NodeOutput({"samples": known.repeat(repeats), "noise_mask": mask.repeat(repeats)})


class TrimVideoLatent(io.ComfyNode):
    """Takes away reference frames that were put before a video."""

    @classmethod
    def define_schema(cls):
        count = io.Int.Input("trim_amount", default=0, min=0, max=MOST_FRAMES)
        return io.Schema(
            node_id=cls.__name__,
            category="latent/video",
            inputs=[io.Latent.Input("samples"), count],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], trim_amount: int):
        video = samples["samples"]
        if video.ndim <= FRAMES + 2:
            raise ValueError(f"a latent of shape {list(video.shape)} is no video; trimming needs one with frames")
        kept = max(0, video.shape[FRAMES] - trim_amount)
        trimmed = video.narrow(FRAMES, video.shape[FRAMES] - kept, kept)
        return io.NodeOutput({**samples, "samples": trimmed})


comfy_entrypoint = extension(
    WanImageToVideo, WanFunControlToVideo, Wan22FunControlToVideo, WanFunInpaintToVideo, WanFirstLastFrameToVideo,
    WanVaceToVideo, TrimVideoLatent, WanCameraImageToVideo, WanPhantomSubjectToVideo, Wan22ImageToVideoLatent,
    WanTrackToVideo, WanSoundImageToVideo, WanSoundImageToVideoExtend, WanHuMoImageToVideo, WanAnimateToVideo,
)  # fmt: skip
