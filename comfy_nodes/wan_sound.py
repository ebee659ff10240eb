"""Nodes of Wan's models that are led by sound: S2V (Wan 2.2) and HuMo (Chen et al. 2025)."""

from __future__ import annotations

from typing import Any

import torch

from comfy_api.latest import io
from comfy_nodes.vae import need_vae
from comfy_nodes.wan import (
    CELL,
    FRAMES,
    GREY,
    both,
    conditionings,
    empty,
    latent_frames,
    nothing,
    picture,
    put,
    resized,
    schema,
    video_inputs,
)
from node_helpers import conditioning_set_values

SOUND = io.AudioEncoderOutput.Input("audio_encoder_output", optional=True)
ENCODED_RATE = 50  # states a second that encoders of sound give
MOTION_FRAMES, MOTION_LATENTS = 73, 19  # of the video before, which S2V continues
_STATES, _RATE = 30, 16  # states and frames a second for which S2V was trained
_HUMO_RATE = 25
_WINDOW, _AROUND = 8, 2  # states of sound for a latent frame of HuMo, and how many of these are its neighbours'


def at_rate(states: torch.Tensor, rate: float, new_rate: float) -> torch.Tensor:
    """States [B, n, C] of `rate` a second at another rate, linearly between neighbours; both ends stay."""
    count = int(states.shape[1] / rate * new_rate)
    return torch.nn.functional.interpolate(
        states.transpose(1, 2), size=count, mode="linear", align_corners=True
    ).transpose(1, 2)


def states_of_frames(layers: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """The states of `count` frames of the video from frame `first` on: layers [n, t, C] -> [1, n, C, count].

    Zeros where the sound has ended, up to a whole number of clips of `count` frames; fewer frames after that.
    """
    states = at_rate(layers, ENCODED_RATE, _STATES)
    length = states.shape[1]
    clips = int(length / (count * _STATES / _RATE)) + 1
    places = (torch.arange(clips * count, dtype=torch.float64) / _RATE * _STATES).round().long()
    places = places[first : first + count].to(states.device)
    chosen = states[:, places.clamp(max=length - 1)] * (places < length).to(states)[:, None]
    return chosen.transpose(1, 2).unsqueeze(0)


def sound_to_video(
    positive: Any, negative: Any, vae: Any, size: tuple[int, int, int, int], sound: Any, reference: torch.Tensor | None,
    control: torch.Tensor | None, before: torch.Tensor | None, first: int = 0,
) -> io.NodeOutput:  # fmt: skip
    """A clip of S2V of size (width, height, length, batch) that begins at frame `first` of the whole video.

    before: the latent of the video before it. The negative prompt goes with silence.
    """
    width, height, length, count = size
    latent = empty(16, width, height, length, count)
    if sound is not None:
        layers = torch.cat(tuple(sound["encoded_audio_all_layers"]))
        states = states_of_frames(layers, first, latent.shape[FRAMES] * 4)
        if states.shape[-1]:
            positive = conditioning_set_values(positive, {"audio_embed": states})
            negative = conditioning_set_values(negative, {"audio_embed": torch.zeros_like(states)})
    if reference is not None:
        seen = vae.encode(resized(reference[:1], width, height)[..., :3])
        positive, negative = both(positive, negative, {"reference_latents": [seen]}, append=True)
    if before is not None:
        positive, negative = both(positive, negative, {"reference_motion": before[:, :, -MOTION_LATENTS:]})
    controls = nothing(latent)
    if control is not None:
        put(controls, vae.encode(resized(control[:length], width, height)[..., :3]))
    positive, negative = both(positive, negative, {"control_video": controls})
    return io.NodeOutput(positive, negative, {"samples": latent})


class WanSoundImageToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        pictures = [picture(name) for name in ("ref_image", "control_video", "ref_motion")]
        return schema(cls, conditionings(*video_inputs(length=77), SOUND, *pictures))

    @classmethod
    def execute(
        cls, positive: Any, negative: Any, vae: Any, width: int, height: int, length: int, batch_size: int,
        audio_encoder_output: Any = None, ref_image: torch.Tensor | None = None,
        control_video: torch.Tensor | None = None, ref_motion: torch.Tensor | None = None,
    ):  # fmt: skip
        """The first clip of a video that follows a sound; it continues `ref_motion`."""
        need_vae(vae)
        before = None
        if ref_motion is not None:
            frames = resized(ref_motion[-MOTION_FRAMES:], width, height)[..., :3]
            video = frames.new_full((MOTION_FRAMES, height, width, 3), GREY)
            video[MOTION_FRAMES - frames.shape[0] :] = frames
            before = vae.encode(video)
        size = (width, height, length, batch_size)
        return sound_to_video(
            positive, negative, vae, size, audio_encoder_output, ref_image, control_video, before
        )  # fmt: skip


class WanSoundImageToVideoExtend(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        length = video_inputs(length=77)[2]
        pictures = [picture(name) for name in ("ref_image", "control_video")]
        return schema(cls, conditionings(length, io.Latent.Input("video_latent"), SOUND, *pictures))

    @classmethod
    def execute(
        cls, positive: Any, negative: Any, vae: Any, length: int, video_latent: dict[str, Any],
        audio_encoder_output: Any = None, ref_image: torch.Tensor | None = None,
        control_video: torch.Tensor | None = None,
    ):  # fmt: skip
        """The next clip after `video_latent`, which is the video so far; the sound goes on where it ends."""
        need_vae(vae)
        before = video_latent["samples"]
        size = (before.shape[-1] * CELL, before.shape[-2] * CELL, length, before.shape[0])
        first = before.shape[FRAMES] * 4
        return sound_to_video(
            positive, negative, vae, size, audio_encoder_output, ref_image, control_video, before, first
        )  # fmt: skip


def windows(states: torch.Tensor, length: int) -> torch.Tensor:
    """States [t, n, C], one a frame -> those around each latent frame of a video, [F, 8, n, C]; zeros outside the sound.

    A latent frame is four frames, with two on either side; the first is one frame, of which the window has no three more.
    """
    first = torch.arange(latent_frames(length)) * 4 - 3 - _AROUND
    places = first[:, None] + torch.arange(_WINDOW)
    known = ((places >= 0) & (places < states.shape[0])).to(states)[..., None, None]
    return states[places.clamp(0, states.shape[0] - 1).to(states.device)] * known


class WanHuMoImageToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        inputs = conditionings(*video_inputs(length=97), SOUND, picture("ref_image"))
        return schema(cls, inputs, experimental=True)

    @classmethod
    def execute(
        cls, positive: Any, negative: Any, vae: Any, width: int, height: int, length: int, batch_size: int,
        audio_encoder_output: Any = None, ref_image: torch.Tensor | None = None,
    ):  # fmt: skip
        """A video of the subject in `ref_image` that follows a sound; the negative prompt goes without both."""
        latent = empty(16, width, height, length, batch_size)
        seen = torch.zeros_like(latent[:, :, :1])
        if ref_image is not None:
            need_vae(vae)
            seen = vae.encode(resized(ref_image[:1], width, height)[..., :3])
        positive = conditioning_set_values(positive, {"reference_latents": [seen]}, append=True)
        negative = conditioning_set_values(negative, {"reference_latents": [torch.zeros_like(seen)]}, append=True)
        states = torch.zeros((batch_size, latent.shape[FRAMES], _WINDOW, 5, 1280))
        if audio_encoder_output is not None:
            layers = torch.stack(tuple(audio_encoder_output["encoded_audio_all_layers"]), dim=2)
            # 640 samples a frame of the video; what encoders see after the sound is padding
            layers = layers[:, : audio_encoder_output["audio_samples"] // 640 * 2]
            groups = [layers[:, :, i : i + 8].mean(dim=2) for i in range(0, 32, 8)] + [layers[:, :, 32]]
            groups = [at_rate(group, ENCODED_RATE, _HUMO_RATE) for group in groups]
            states = windows(torch.stack(groups, dim=2)[0], length).unsqueeze(0)
        positive = conditioning_set_values(positive, {"audio_embed": states})
        negative = conditioning_set_values(negative, {"audio_embed": torch.zeros_like(states)})
        return io.NodeOutput(positive, negative, {"samples": latent})
