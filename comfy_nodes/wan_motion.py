"""Nodes of Wan's models that are led by motion: Animate (Wan 2.2), and paths of points (ATI, Wang et al. 2025)."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
import torch.nn.functional as F

import comfy.latent_formats
from comfy_api.latest import io
from comfy_nodes.fields import MAX_RESOLUTION
from comfy_nodes.image import scaled
from comfy_nodes.vae import need_vae
from comfy_nodes.wan import (
    FRAMES,
    GREY,
    THREE,
    VISION,
    both,
    by_four,
    conditionings,
    empty,
    picture,
    resized,
    schema,
    video_inputs,
    with_vision,
)
from node_helpers import conditioning_set_values

FACE = 512  # side of the pictures of faces
TRACKED = 121  # points of a path


# --- Animate ----------------------------------------------------------------------------------------------------------


def _from_frame(video: torch.Tensor | None, first: int) -> torch.Tensor | None:
    """The video from a frame on, or None where nothing is left."""
    return video[first:] if video is not None and video.shape[0] > first else None


def character_places(mask: torch.Tensor, first: int, length: int, rows: int, columns: int) -> torch.Tensor | None:
    """Where the character is in each of `length` frames from `first` on, or fewer: [1, 1, n, rows, columns].

    mask [T, H, W] or [H, W]; one frame holds for all. None where nothing is left.
    """
    frames = mask.reshape(-1, *mask.shape[-2:])
    frames = frames.expand(length, -1, -1) if frames.shape[0] == 1 else frames[first : first + length]
    if not frames.shape[0]:
        return None
    cells = scaled(frames[..., None], columns, rows, "nearest-exact", "center")
    return cells[..., 0][None, None]


class WanAnimateToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = ("reference_image", "face_video", "pose_video", "background_video")
        most = io.Int.Input("continue_motion_max_frames", default=5, min=1, max=MAX_RESOLUTION, step=4)
        offset = io.Int.Input(
            "video_frame_offset", default=0, min=0, max=MAX_RESOLUTION, step=1,
            tooltip="The frame of the input videos at which this clip begins: that output of the clip before.",
        )  # fmt: skip
        inputs = conditionings(*video_inputs(length=77), VISION, *map(picture, names))
        mask = io.Mask.Input("character_mask", optional=True)
        inputs += [mask, picture("continue_motion"), most, offset]
        numbers = ("trim_latent", "trim_image", "video_frame_offset")
        outputs = [*THREE, *(io.Int.Output(display_name=name) for name in numbers)]
        return schema(cls, inputs, outputs, experimental=True)

    @classmethod
    def execute(
        cls, positive: Any, negative: Any, vae: Any, width: int, height: int, length: int, batch_size: int,
        continue_motion_max_frames: int, video_frame_offset: int, reference_image: torch.Tensor | None = None,
        clip_vision_output: Any = None, face_video: torch.Tensor | None = None, pose_video: torch.Tensor | None = None,
        continue_motion: torch.Tensor | None = None, background_video: torch.Tensor | None = None,
        character_mask: torch.Tensor | None = None,
    ):  # fmt: skip
        """The character of the first picture in the motion of the videos.

        `trim_latent`: latent frames of the reference, in front. `trim_image`: frames that the clip before has, too.
        """
        need_vae(vae)
        first = video_frame_offset

        def frames(video: torch.Tensor) -> torch.Tensor:
            return resized(video[:length], width, height, "area")[..., :3]

        reference = torch.zeros((1, height, width, 3)) if reference_image is None else reference_image
        seen = vae.encode(frames(reference))
        latent = empty(16, width, height, length, batch_size)
        video, known = torch.full((length, height, width, 3), GREY), 0
        places = seen.new_ones((1, 1, latent.shape[FRAMES] * 4, *seen.shape[-2:]))
        if continue_motion is not None:
            before = continue_motion[-continue_motion_max_frames:]
            first = max(0, first - before.shape[0])
            before = frames(before[-length:])
            video[: before.shape[0]] = before
            known = (before.shape[0] - 1) // 4 + 1
            places[:, :, : known * 4] = 0.0
        positive, negative = with_vision(positive, negative, clip_vision_output)
        positive, negative = _motion(positive, negative, vae, _from_frame(pose_video, first), frames, length)
        face = _from_frame(face_video, first)
        if face is not None:
            pixels = scaled(face[:length, ..., :3], FACE, FACE, "area", "center") * 2.0 - 1.0
            pixels = pixels.movedim(-1, 0).unsqueeze(0)
            positive = conditioning_set_values(positive, {"face_video_pixels": pixels})
            negative = conditioning_set_values(negative, {"face_video_pixels": torch.full_like(pixels, -1.0)})
        trim = max(0, known * 4 - 3)
        behind = _from_frame(background_video, first)
        if behind is not None:
            behind = frames(behind)
            video[trim : behind.shape[0]] = behind[trim:]
        if character_mask is not None:
            shown = character_places(character_mask, first, length, *seen.shape[-2:])
            if shown is not None:
                places[:, :, trim : shown.shape[2]] = shown[:, :, trim:]
        mask = torch.cat((seen.new_zeros((1, 4, *seen.shape[2:])), by_four(places)), dim=FRAMES)
        values = {"concat_latent_image": torch.cat((seen, vae.encode(video)), dim=FRAMES), "concat_mask": mask}
        positive, negative = both(positive, negative, values)
        trim_latent = seen.shape[FRAMES]
        latent = torch.cat((latent.new_zeros((*latent.shape[:2], trim_latent, *latent.shape[3:])), latent), dim=FRAMES)
        return io.NodeOutput(positive, negative, {"samples": latent}, trim_latent, trim, first + length)


def _motion(
    positive: Any, negative: Any, vae: Any, pose: torch.Tensor | None, frames: Any, length: int
) -> tuple[Any, Any]:
    """The motion of a body as a latent; the last pose stays until the end."""
    if pose is None:
        return positive, negative
    shown = frames(pose)
    shown = torch.cat([shown, *[shown[-1:]] * (length - shown.shape[0])])
    return both(positive, negative, {"pose_video_latent": vae.encode(shown)})


# --- paths of points --------------------------------------------------------------------------------------------------


def read_tracks(text: str) -> list[list[dict[str, float]]]:
    """Paths of points {x, y} in pixels, from JSON: one path or a list of them.

    Raises ValueError for other text.
    """
    try:
        found = json.loads(text.replace("'", '"'))
    except json.JSONDecodeError as error:
        raise ValueError(f"the tracks are not JSON: {error}; give a list of points with x and y") from error
    paths = [found] if isinstance(found, list) and found and isinstance(found[0], dict) else found
    good = isinstance(paths, list) and all(isinstance(path, list) for path in paths)
    if not good or not all(isinstance(point, dict) and {"x", "y"} <= set(point) for path in paths for point in path):
        raise ValueError("the tracks must be a list of points with x and y, or a list of such lists")
    return [path for path in paths if path]


def track_points(
    paths: list[list[dict[str, float]]], width: int, height: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places [length, N, 2] (x, y; the shorter side from -1 to 1) and visibility [length, N] (-1 or 1) of points by frame.

    Paths have 121 points: they are cut, and what is missing is invisible. The frames are spread evenly over them.
    """
    points = torch.zeros((TRACKED, len(paths), 3))
    for i, path in enumerate(paths):
        given = torch.tensor([[float(p["x"]), float(p["y"]), 1.0] for p in path[:TRACKED]])
        points[: given.shape[0], i] = given
    centre = torch.tensor([width, height]) / 2
    places = (points[..., :2] - centre) / min(width, height) * 2
    common = math.gcd(TRACKED - 1, length - 1)
    every, copies = (TRACKED - 1) // common, (length - 1) // common
    later = torch.arange(min(1, every - 1), (TRACKED - 1) * copies, every) // copies
    kept = torch.cat((torch.zeros(1, dtype=torch.long), 1 + later))
    return places[kept], points[kept, :, 2] * 2 - 1


def along_tracks(
    latent: torch.Tensor, places: torch.Tensor, visible: torch.Tensor, temperature: float, topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(a latent [C, F, h, w] in which the first frame's features follow the points, their weight [F, h, w]).

    Each cell takes the features of its `topk` nearest points, weighted by exp(-temperature * distance^2).
    """
    channels, frames, height, width = latent.shape
    short = min(height, width)
    visible = visible.clamp(0, 1)
    axes = [torch.linspace(-size / short, size / short, size) for size in (height, width)]
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    cells = torch.stack((columns, rows), dim=-1).to(latent.device)
    places, visible = places.to(latent.device), visible.to(latent.device)
    seen = visible[1:].unflatten(0, (frames - 1, 4))
    times = seen.sum(dim=1)  # of the four frames of a latent frame, in which a point is seen
    mean = (places[1:].unflatten(0, (frames - 1, 4)) * seen[..., None]).sum(dim=1) / (times + 1e-5)[..., None]
    distance = (mean[:, None, None] - cells[None, :, :, None]).square().sum(dim=-1)
    weights = torch.exp(-distance * temperature) * times.clamp(0, 1)[:, None, None]
    weights, nearest = weights.topk(min(topk, weights.shape[-1]), dim=-1)
    scale = torch.tensor([width / short, height / short], device=latent.device)
    start = (places[0] / scale).clamp(-1, 1)[None, None].to(latent.dtype)
    features = F.grid_sample(latent[None, :, 0], start, align_corners=False)[0, :, 0]  # [C, N]
    moved = (features[:, nearest] * weights).sum(dim=-1)
    total = weights.sum(dim=-1)
    mixed = moved + latent[:, 1:] * (1 - total.clamp(0, 1))
    first = total.new_ones((1, height, width))
    return torch.cat((latent[:, :1], mixed), dim=1), torch.cat((first, total))


class WanTrackToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        tracks = io.String.Input(
            "tracks", multiline=True, default="[]",
            tooltip="JSON: paths of points {x, y} in pixels, 121 a path for the whole video.",
        )  # fmt: skip
        warmth = io.Float.Input(
            "temperature",
            default=220.0,
            min=1.0,
            max=1000.0,
            step=0.1,
            tooltip="The higher, the fewer cells a point moves.",
        )
        nearest = io.Int.Input("topk", default=2, min=1, max=10, tooltip="How many points move a cell.")
        inputs = conditionings(tracks, *video_inputs(), warmth, nearest, io.Image.Input("start_image"), VISION)
        return schema(cls, inputs)

    @classmethod
    def execute(
        cls, positive: Any, negative: Any, vae: Any, tracks: str, width: int, height: int, length: int, batch_size: int,
        temperature: float, topk: int, start_image: torch.Tensor, clip_vision_output: Any = None,
    ):  # fmt: skip
        """The picture's points move along paths."""
        paths = read_tracks(tracks)
        if paths:
            if length < 5 or (length - 1) % 4:
                raise ValueError(f"paths of points need a video of 5, 9, 13, ... frames, not {length}")
            need_vae(vae)
            start = resized(start_image[:length], width, height)[..., :3]
            video = torch.cat((start, start.new_full((length - start.shape[0], height, width, 3), GREY)))
            kind = comfy.latent_formats.Wan21()
            points = track_points(paths, width, height, length)
            moved, weight = along_tracks(kind.process_in(vae.encode(video))[0], *points, temperature, topk)
            known = weight.to(moved)[None, None].expand(1, 4, -1, -1, -1)
            values = {"concat_latent_image": kind.process_out(moved.unsqueeze(0)), "concat_mask": 1.0 - known}
            positive, negative = both(positive, negative, values)
        positive, negative = with_vision(positive, negative, clip_vision_output)
        return io.NodeOutput(positive, negative, {"samples": empty(16, width, height, length, batch_size)})
