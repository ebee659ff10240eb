"""Paths of a camera as rays, for Wan's camera models (CameraCtrl, He et al. 2024).

A frame's rays are Plücker coordinates (moment, direction) of the lines through its pixels, relative to the first frame.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from comfy_api.latest import io
from comfy_nodes.fields import MAX_RESOLUTION
from comfy_nodes.v3 import extension, share, side

# by name: axes of rotation (x, y, z), and directions of translation
POSES: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "Static": ((0, 0, 0), (0, 0, 0)),
    "Pan Up": ((0, 0, 0), (0, -1, 0)),
    "Pan Down": ((0, 0, 0), (0, 1, 0)),
    "Pan Left": ((0, 0, 0), (-1, 0, 0)),
    "Pan Right": ((0, 0, 0), (1, 0, 0)),
    "Zoom In": ((0, 0, 0), (0, 0, 2)),
    "Zoom Out": ((0, 0, 0), (0, 0, -2)),
    "Anti Clockwise (ACW)": ((0, 0, -1), (0, 0, 0)),
    "ClockWise (CW)": ((0, 0, 1), (0, 0, 0)),
}
TURN, WAY = math.pi / 3, 1.5  # of a whole video at speed 1
SOURCE_ASPECT = 1280 / 720  # of the videos for which focal lengths are given


def _rotation(angles: torch.Tensor) -> torch.Tensor:
    """Rz Ry Rx of angles [n, 3] -> [n, 3, 3]."""
    out = torch.eye(3, dtype=angles.dtype).expand(len(angles), 3, 3)
    for axis in range(3):
        cos, sin = angles[:, axis].cos(), angles[:, axis].sin()
        first, second = [i for i in range(3) if i != axis]
        if axis == 1:
            first, second = second, first
        turn = torch.eye(3, dtype=angles.dtype).repeat(len(angles), 1, 1)
        turn[:, first, first] = turn[:, second, second] = cos
        turn[:, first, second], turn[:, second, first] = -sin, sin
        out = turn @ out
    return out


def poses(kind: str, length: int, speed: float) -> torch.Tensor:
    """World to camera of each frame, [length, 4, 4]."""
    progress = torch.arange(length, dtype=torch.float64)[:, None] / length * speed
    axes, directions = (torch.tensor(vector, dtype=torch.float64) for vector in POSES[kind])
    out = torch.eye(4, dtype=torch.float64).repeat(length, 1, 1)
    out[:, :3, :3] = _rotation(progress * TURN * axes)
    out[:, :3, 3] = progress * WAY * directions
    return out


def rays(path: torch.Tensor, width: int, height: int, focal: tuple[float, float], centre: tuple[float, float]) -> Any:
    """Plücker coordinates [n, 6, height, width] for poses [n, 4, 4]; focal lengths and centre in parts of the sides."""
    fx, fy = focal
    if width / height < SOURCE_ASPECT:
        fx = fx * height * SOURCE_ASPECT / width
    else:
        fy = fy * width / SOURCE_ASPECT / height
    to_world = torch.linalg.inv(path)
    to_world = path[:1] @ to_world
    columns = (torch.arange(width, dtype=torch.float64) + 0.5 - centre[0] * width) / (fx * width)
    rows = (torch.arange(height, dtype=torch.float64) + 0.5 - centre[1] * height) / (fy * height)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    directions = torch.nn.functional.normalize(torch.stack((x, y, torch.ones_like(x)), dim=-1), dim=-1)
    turned = torch.einsum("nij,hwj->nhwi", to_world[:, :3, :3], directions)
    origins = to_world[:, None, None, :3, 3].expand_as(turned)
    return torch.cat((torch.linalg.cross(origins, turned), turned), dim=-1).permute(0, 3, 1, 2).float()


def folded(frames: torch.Tensor) -> torch.Tensor:
    """[4 k + 1, 6, H, W] -> [1, 24, k + 1, H, W]: the first frame four times, then four frames for each latent frame."""
    groups = torch.cat((frames[:1].repeat(3, 1, 1, 1), frames)).unflatten(0, (-1, 4))
    return groups.permute(2, 1, 0, 3, 4).flatten(0, 1).unsqueeze(0)


class WanCameraEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = ("camera_embedding", "width", "height", "length")
        kinds = (io.WanCameraEmbedding, io.Int, io.Int, io.Int)
        return io.Schema(
            node_id=cls.__name__,
            category="camera",
            inputs=[
                io.Combo.Input("camera_pose", options=list(POSES), default="Static"),
                side("width", 832),
                side("height", 480),
                io.Int.Input("length", default=81, min=1, max=MAX_RESOLUTION, step=4),
                share("speed", 1.0, high=10.0, step=0.1, optional=True),
                *(share(name, 0.5, step=1e-9, optional=True) for name in ("fx", "fy")),
                *(share(name, 0.5, optional=True) for name in ("cx", "cy")),
            ],
            outputs=[kind.Output(display_name=name) for name, kind in zip(names, kinds)],
        )

    @classmethod
    def execute(
        cls, camera_pose: str, width: int, height: int, length: int, speed: float = 1.0, fx: float = 0.5,
        fy: float = 0.5, cx: float = 0.5, cy: float = 0.5,
    ):  # fmt: skip
        """Lengths are cut to a multiple of four and one frame."""
        frames = (length - 1) // 4 * 4 + 1
        path = poses(camera_pose, length, speed)[:frames]
        return io.NodeOutput(folded(rays(path, width, height, (fx, fy), (cx, cy))), width, height, length)

    run = execute


comfy_entrypoint = extension(WanCameraEmbedding)
