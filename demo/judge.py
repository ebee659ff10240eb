"""A judge of pictures: finds the objects by their pixels and says whether they are what a scene asks for."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import ndimage

from demo.render import shape_distance
from demo.scenes import COLORS, POSITIONS, SHAPES, SIZES, Spec

_SEEN = 0.22  # least distance in RGB of an object's pixel from the background
_LEAST_AREA = 40  # pixels of the smallest thing counted, in a picture whose short side is 128
_LEAST_FIT = 0.70  # intersection over union with the shape's own outline
_BOX = {"square": 0.88, "triangle": 0.81, "star": 0.93}  # half the mean side of the bounding box, by the radius
_NAMES = list(COLORS)
_PALETTE = np.array([COLORS[name] for name in _NAMES])


@dataclass(frozen=True)
class Found:
    """An object in a picture: centre and radius in pixels; `fit` is the IoU with its shape's outline."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    fit: float


@dataclass
class Verdict:
    """What is right: shapes and colours of all objects with none too many, their relation, and finer points.

    `wrong` says in words what is not.
    """

    objects: bool
    relation: bool
    position: bool
    size: bool
    background: bool
    wrong: list[str] = field(default_factory=list)

    @property
    def right(self) -> bool:
        """Shapes, colours and relation."""
        return self.objects and self.relation


def _nearest(rgb: np.ndarray) -> str:
    return _NAMES[int(((_PALETTE - rgb) ** 2).sum(1).argmin())]


def background_of(picture: np.ndarray) -> np.ndarray:
    """RGB of the border's median pixel; picture [H, W, 3] in 0..1."""
    border = np.concatenate([picture[:2].reshape(-1, 3), picture[-2:].reshape(-1, 3), picture[:, :2].reshape(-1, 3),
                             picture[:, -2:].reshape(-1, 3)])  # fmt: skip
    return np.median(border, axis=0)


def _outline(kind: int, height: int, width: int) -> np.ndarray:
    """The shape filling a box of height x width, as booleans."""
    y, x = torch.meshgrid(torch.linspace(-1.2, 1.2, 97), torch.linspace(-1.2, 1.2, 97), indexing="ij")
    rows, cols = np.where((shape_distance(kind, x, y) < 0).numpy())
    ys = np.linspace(rows.min(), rows.max() + 1, height, endpoint=False) + (rows.max() + 1 - rows.min()) / height / 2
    xs = np.linspace(cols.min(), cols.max() + 1, width, endpoint=False) + (cols.max() + 1 - cols.min()) / width / 2
    to_unit = 2.4 / 96
    grid_y, grid_x = np.meshgrid((ys - 0.5) * to_unit - 1.2, (xs - 0.5) * to_unit - 1.2, indexing="ij")
    return (shape_distance(kind, torch.from_numpy(grid_x), torch.from_numpy(grid_y)) < 0).numpy()


def _identify(mask: np.ndarray) -> tuple[str, float]:
    """(shape, IoU) of a mask cropped to its object."""
    height, width = mask.shape
    if not 0.6 < height / width < 1.67:
        return SHAPES[0], 0.0
    fits = []
    for kind in range(len(SHAPES)):
        outline = _outline(kind, height, width)
        fits.append((mask & outline).sum() / (mask | outline).sum())
    best = int(np.argmax(fits))
    return SHAPES[best], float(fits[best])


def find(picture: np.ndarray) -> list[Found]:
    """The objects of a picture [H, W, 3] in 0..1, left to right."""
    height, width = picture.shape[:2]
    scale = min(height, width) / 128
    apart = np.sqrt(((picture - background_of(picture)) ** 2).sum(-1)) > _SEEN
    labels, count = ndimage.label(apart)
    found = []
    for index, where in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[where] == index
        if mask.sum() < _LEAST_AREA * scale * scale:
            continue
        core = ndimage.binary_erosion(mask, iterations=2)
        pixels = picture[where][core if core.any() else mask]
        shape, fit = _identify(mask)
        rows, cols = where
        found.append(
            Found(
                shape,
                _nearest(np.median(pixels, axis=0)),
                (cols.start + cols.stop) / 2,
                (rows.start + rows.stop) / 2,
                (rows.stop - rows.start + cols.stop - cols.start) / 4 / _BOX.get(shape, 1.0),
                fit,
            )
        )
    return sorted(found, key=lambda thing: thing.x)


def _assign(spec: Spec, found: list[Found]) -> list[list[Found]]:
    """Every order of the found objects in which shapes and colours are those of the spec's things."""
    wanted = spec.things * spec.count
    if len(found) != len(wanted) or any(thing.fit < _LEAST_FIT for thing in found):
        return []
    return [
        list(order)
        for order in itertools.permutations(found)
        if all((f.shape, f.color) == (w.shape, w.color) for f, w in zip(order, wanted))
    ]


def _related(spec: Spec, order: list[Found]) -> bool:
    relation = spec.relation
    if relation in (None, "and"):
        return True
    if relation in ("below", "right"):
        order = order[::-1]
    across = relation in ("left", "right", "row")
    for first, second in zip(order, order[1:]):
        along, level = (second.x - first.x, second.y - first.y) if across else (second.y - first.y, second.x - first.x)
        if along <= abs(level):
            return False
    return True


def _positioned(spec: Spec, thing: Found, width: int, height: int) -> bool:
    if spec.position is None:
        return True
    shares = POSITIONS[spec.position]
    return all(
        abs(at / length - share) < 0.17 for at, length, share in zip((thing.x, thing.y), (width, height), shares)
    )


def _sized(spec: Spec, order: list[Found], scale: float) -> bool:
    """Small is below, large above the radius between the two of its kind of scene."""
    between = {"single": 22.0, "pair": 19.0}.get(spec.kind, 14.5) * scale
    return all(
        thing.size is None or (thing.size == SIZES[0]) == (seen.radius < between)
        for thing, seen in zip(spec.things, order)
    )


def judge(picture: np.ndarray, spec: Spec) -> Verdict:
    """How a picture [H, W, 3] in 0..1 meets `spec`."""
    height, width = picture.shape[:2]
    found = find(picture)
    orders = _assign(spec, found)
    ground = background_of(picture)
    verdict = Verdict(bool(orders), False, False, False, spec.background is None or _nearest(ground) == spec.background)
    if not orders:
        seen = ", ".join(f"{f.color} {f.shape} ({f.fit:.2f})" for f in found) or "nothing"
        verdict.wrong.append(f"seen: {seen}")
    related = [order for order in orders if _related(spec, order)]
    verdict.relation = bool(related)
    order = (related or orders or [[]])[0]
    if order:
        verdict.position = spec.kind != "single" or _positioned(spec, order[0], width, height)
        verdict.size = _sized(spec, order, min(height, width) / 128)
        if not verdict.relation:
            verdict.wrong.append(f"not {spec.relation}")
    if not verdict.background:
        verdict.wrong.append(f"background {_nearest(ground)}")
    return verdict
