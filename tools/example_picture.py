"""Draws input/example.png, the picture that *Load Image* shows before there is another one: hills by the sea at sunset.

    .venv/bin/python -m tools.example_picture

It is made of formulas only, so it is ours, and under the licence of the program.
"""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

FILE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "input", "example.png")
WIDTH, HEIGHT = 768, 512
HORIZON = 0.62  # of the height
SUN = (0.66, 0.47, 0.07)  # x, y and radius, in heights; x in widths
_SKY = ((26, 36, 84), (244, 152, 96), (255, 214, 150))  # top, middle, horizon
_SEA = ((70, 86, 128), (16, 28, 62))  # horizon, bottom
# hills: height above the horizon, its waves (times over the width, phase, share), colour
_HILLS = (
    (0.16, ((1.3, 0.4, 0.6), (3.7, 1.9, 0.3), (9.1, 0.0, 0.1)), (104, 84, 120)),
    (0.10, ((2.1, 2.6, 0.6), (5.3, 0.7, 0.3), (13.0, 1.0, 0.1)), (62, 58, 96)),
    (0.05, ((3.2, 5.1, 0.7), (8.9, 2.2, 0.3)), (30, 34, 66)),
)


def _between(stops: tuple[tuple[int, ...], ...], at: np.ndarray) -> np.ndarray:
    """Colours [..., 3] at positions 0..1 of a row of colours."""
    places = np.linspace(0.0, 1.0, len(stops))
    return np.stack([np.interp(at, places, [stop[channel] for stop in stops]) for channel in range(3)], axis=-1)


def _cover(edge: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How much of each pixel lies below an edge, with soft steps of a pixel."""
    return np.clip((y - edge) * HEIGHT + 0.5, 0.0, 1.0)[..., None]


def draw() -> np.ndarray:
    """uint8 [HEIGHT, WIDTH, 3]."""
    x = (np.arange(WIDTH) + 0.5)[None] / WIDTH + np.zeros((HEIGHT, 1))
    y = (np.arange(HEIGHT) + 0.5)[:, None] / HEIGHT + np.zeros((1, WIDTH))
    picture = _between(_SKY, y / HORIZON)
    distance = np.hypot((x - SUN[0]) * WIDTH / HEIGHT, y - SUN[1])
    picture += (np.exp(-((distance / (4 * SUN[2])) ** 2)) * 60)[..., None] * np.array([1.0, 0.6, 0.2])
    disc = np.clip((SUN[2] - distance) * HEIGHT + 0.5, 0.0, 1.0)[..., None]
    picture += disc * (np.array([255.0, 240.0, 200.0]) - picture)
    for height, waves, colour in _HILLS:
        ridge = sum(share * (0.5 + 0.5 * np.sin(2 * np.pi * times * x + phase)) for times, phase, share in waves)
        picture += _cover(HORIZON - height * ridge, y) * (np.array(colour, float) - picture)
    depth = (y - HORIZON) / (1 - HORIZON)
    sea = _between(_SEA, depth)
    ripple = np.sin(2 * np.pi * 18 / (0.15 + np.clip(depth, 0, 1)) + 3 * np.sin(9 * x))
    path = np.exp(-(((x - SUN[0]) / (0.03 + 0.10 * np.clip(depth, 0, 1))) ** 2)) * (0.55 + 0.45 * ripple)
    sea += path[..., None] * np.array([170.0, 110.0, 50.0])
    picture += _cover(np.full_like(y, HORIZON), y) * (sea - picture)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def main() -> None:
    os.makedirs(os.path.dirname(FILE), exist_ok=True)
    Image.fromarray(draw()).save(FILE, optimize=True)
    print(f"{FILE}: {os.path.getsize(FILE)} bytes")


if __name__ == "__main__":
    main()
