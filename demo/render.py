"""Scenes to pixels: signed distances of the shapes, drawn in batches on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from demo.scenes import SHAPES, Scene

MAX_OBJECTS = 4
_HOLE = 0.5  # a ring's inner radius, a cross's half arm: shares of the radius
_ARM = 0.32
_STAR_INNER = 0.42
NIGHT = (0.05, 0.07, 0.20)

SceneArrays = dict[str, torch.Tensor]


def to_arrays(scenes: Sequence[Scene]) -> SceneArrays:
    """Scenes of one size as tensors: kind [B, N] (-1: none), place [B, N, 3] (x, y, radius), rgb [B, N, 3],
    background [B, 3]."""
    kind = torch.full((len(scenes), MAX_OBJECTS), -1, dtype=torch.int64)
    place = torch.zeros((len(scenes), MAX_OBJECTS, 3))
    rgb = torch.zeros((len(scenes), MAX_OBJECTS, 3))
    for i, scene in enumerate(scenes):
        count = len(scene.objects)
        kind[i, :count] = torch.tensor([SHAPES.index(o.shape) for o in scene.objects])
        place[i, :count] = torch.tensor([(o.x, o.y, o.radius) for o in scene.objects])
        rgb[i, :count] = torch.tensor([o.rgb for o in scene.objects])
    return {"kind": kind, "place": place, "rgb": rgb, "background": torch.tensor([s.background for s in scenes])}


def _polygon(x: torch.Tensor, y: torch.Tensor, corners: int, inner: float) -> torch.Tensor:
    """Distance (exact near the edges) to a regular star, or to a regular polygon if `inner` is cos(pi / corners).

    The plane is folded into one sector of half a corner, where the outline is a single segment.
    """
    sector = math.pi / corners
    angle = torch.atan2(x, -y).abs()  # from straight up
    folded = (angle + sector).remainder(2 * sector) - sector
    length = torch.hypot(x, y)
    px, py = length * folded.abs().sin(), length * folded.cos()
    ex, ey = inner * math.sin(sector), inner * math.cos(sector) - 1.0  # from (0, 1) to the inner corner
    norm = math.hypot(ex, ey)
    return (px * -ey + (py - 1.0) * ex) / norm


def shape_distance(kind: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Signed distance of points, in units of the shape's radius, to the outline; negative inside. y points down."""
    name = SHAPES[kind]
    if name == "circle":
        return torch.hypot(x, y) - 1.0
    if name == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88
    if name == "triangle":
        # Lowered, so that its bounding box is centred.
        return _polygon(x, y - 0.2, 3, 0.5)
    if name == "star":
        return _polygon(x, y, 5, _STAR_INNER)
    if name == "ring":
        return (torch.hypot(x, y) - (1 + _HOLE) / 2).abs() - (1 - _HOLE) / 2
    bars = [torch.maximum(a.abs() - 1.0, b.abs() - _ARM) for a, b in ((x, y), (y, x))]
    return torch.minimum(*bars)


def coverage(arrays: SceneArrays, width: int, height: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(share of each pixel inside, distance in pixels), each [B, N, H, W], of all objects of a batch."""
    device = arrays["place"].device
    x = torch.arange(width, device=device) + 0.5
    y = torch.arange(height, device=device) + 0.5
    cx, cy, radius = arrays["place"].clamp(min=1e-3)[..., None, None].unbind(2)
    u, v = (x - cx) / radius, (y[:, None] - cy) / radius
    distance = torch.full(torch.broadcast_shapes(u.shape, v.shape), 1e4, device=device)
    kind = arrays["kind"][..., None, None]
    for index in range(len(SHAPES)):
        distance = torch.where(kind == index, shape_distance(index, u, v) * radius, distance)
    return (0.5 - distance).clamp(0.0, 1.0), distance


def render(arrays: SceneArrays, width: int, height: int, style: str = "plain") -> torch.Tensor:
    """Pictures [B, 3, H, W] in 0..1, fp32.

    style: plain, or night (the demo LoRA's: dark blue with stars where a caption's background would be, and objects
    that glow). Raises ValueError for another style.
    """
    if style not in ("plain", "night"):
        raise ValueError(f"style is {style!r}; known are plain and night")
    inside, distance = coverage(arrays, width, height)
    picture = arrays["background"][:, :, None, None].expand(-1, -1, height, width)
    if style == "night":
        picture = _night_sky(arrays, width, height)
        glow = torch.exp(-distance.clamp(min=0) / 7.0) * 0.75
        for i in range(inside.shape[1]):
            picture = torch.lerp(picture, arrays["rgb"][:, i, :, None, None].clamp(min=0.15), glow[:, i, None])
    for i in range(inside.shape[1]):
        picture = torch.lerp(picture, arrays["rgb"][:, i, :, None, None].to(picture), inside[:, i, None])
    return picture


def _night_sky(arrays: SceneArrays, width: int, height: int) -> torch.Tensor:
    """Dark blue with some stars whose places follow from the background's colour: [B, 3, H, W]."""
    background = arrays["background"]
    sky = torch.tensor(NIGHT, device=background.device)[None, :, None, None].expand(len(background), 3, height, width)
    seed = background.sum(1) * 977.0
    number = torch.arange(14, device=background.device)
    phase = seed[:, None, None] + number[:, None] * 78.233 + torch.tensor([0.0, 37.7], device=background.device)
    noise = torch.frac(torch.sin(phase).abs() * 43758.5)
    x = torch.arange(width, device=background.device) + 0.5
    y = torch.arange(height, device=background.device) + 0.5
    dx = x - noise[..., 0, None, None] * width
    dy = y[:, None] - noise[..., 1, None, None] * height
    light = torch.exp(-(dx * dx + dy * dy) / 2.5).amax(1, keepdim=True)
    return sky + light * (1.0 - sky)
