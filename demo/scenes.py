"""The demo model's domain: what a scene holds, how a caption says it, and which scenes training never sees."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.14),
    "green": (0.13, 0.60, 0.24),
    "blue": (0.13, 0.33, 0.86),
    "yellow": (0.98, 0.84, 0.12),
    "orange": (0.97, 0.50, 0.08),
    "purple": (0.52, 0.20, 0.70),
    "pink": (0.98, 0.55, 0.74),
    "cyan": (0.15, 0.80, 0.86),
    "white": (0.98, 0.98, 0.98),
    "black": (0.05, 0.05, 0.06),
    "gray": (0.50, 0.50, 0.51),
}
SIZES = ("small", "large")
POSITIONS: dict[str, tuple[float, float]] = {
    "in the center": (0.5, 0.5),
    "on the left": (0.25, 0.5),
    "on the right": (0.75, 0.5),
    "at the top": (0.5, 0.25),
    "at the bottom": (0.5, 0.75),
    "in the top left corner": (0.25, 0.25),
    "in the top right corner": (0.75, 0.25),
    "in the bottom left corner": (0.25, 0.75),
    "in the bottom right corner": (0.75, 0.75),
}
RELATIONS: dict[str, tuple[str, ...]] = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "and": ("and", "next to", "with"),
}
ROWS: dict[str, tuple[str, ...]] = {
    "row": ("in a row", "from left to right"),
    "column": ("in a column", "from top to bottom"),
    "and": ("",),
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
KINDS = ("single", "count", "pair", "triple")
HELD_OUT = 10  # one scene in so many is kept for evaluation

_OPENINGS = ("", "", "", "", "a picture of ", "an image of ", "a drawing of ")
_SINGLE_RADIUS = {"small": (12, 15), None: (18, 25), "large": (30, 38)}
_PAIR_RADIUS = {"small": (12, 14), None: (16, 21), "large": (24, 28)}
_TRIPLE_RADIUS = {"small": (11, 12), None: (13, 16), "large": (17, 18)}
_GAP = 5.0  # least distance between the bounds of two objects, in pixels of a picture whose short side is 128
_CONTRAST = 0.38  # least distance of an object's colour from the background's, in RGB


@dataclass(frozen=True)
class Thing:
    """One object of a caption; `size` is small, large or None (a caption that does not say)."""

    shape: str
    color: str
    size: str | None = None


@dataclass(frozen=True)
class Spec:
    """What a caption asks for.

    kind: single, count, pair or triple. relation: a key of RELATIONS (pair) or ROWS (triple), the first thing being
    above, left of, ... the second. position: a key of POSITIONS (single). count: how many of `things[0]` (count).
    """

    kind: str
    things: tuple[Thing, ...]
    relation: str | None = None
    position: str | None = None
    count: int = 1
    background: str | None = None

    def key(self) -> str:
        """The scene behind all wordings: that A is above B is that B is below A."""
        things, relation = list(self.things), self.relation
        if relation in ("below", "right"):
            things.reverse()
            relation = {"below": "above", "right": "left"}[relation]
        if relation == "and":
            things.sort(key=str)
        return repr((self.kind, things, relation, self.position, self.count, self.background))

    @property
    def held_out(self) -> bool:
        """Whether training never sees this scene."""
        return zlib.crc32(self.key().encode()) % HELD_OUT == 0


@dataclass(frozen=True)
class Placed:
    """An object on the canvas: centre and radius in pixels, colour as RGB in 0..1."""

    shape: str
    rgb: tuple[float, float, float]
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A picture's content: `width` x `height` pixels, background RGB in 0..1, objects that do not touch."""

    spec: Spec
    caption: str
    width: int
    height: int
    background: tuple[float, float, float]
    objects: tuple[Placed, ...]


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b)) ** 0.5


def _contrasts(background: str, things: Sequence[Thing]) -> bool:
    return all(_distance(COLORS[background], COLORS[thing.color]) > _CONTRAST for thing in things)


def _thing(rng: random.Random, unlike: Sequence[Thing] = ()) -> Thing:
    """A random object that differs in shape or colour from those given."""
    while True:
        size = rng.choice(SIZES) if rng.random() < 0.25 else None
        thing = Thing(rng.choice(SHAPES), rng.choice(list(COLORS)), size)
        if all((thing.shape, thing.color) != (other.shape, other.color) for other in unlike):
            return thing


def random_spec(rng: random.Random, kind: str | None = None) -> Spec:
    """Any spec of the domain (of one kind); pale objects come with a background on which they can be seen."""
    kind = kind or rng.choices(KINDS, weights=(25, 13, 44, 18))[0]
    things = [_thing(rng)]
    relation = position = None
    count = 1
    if kind == "single":
        position = rng.choice(list(POSITIONS)) if rng.random() < 0.5 else None
    elif kind == "count":
        things = [replace(things[0], size=None)]
        count = rng.choice(list(NUMBERS))
    elif kind == "pair":
        things.append(_thing(rng, things))
        relation = rng.choices(list(RELATIONS), weights=(1, 1, 1, 1, 1))[0]
    else:
        for _ in range(2):
            things.append(_thing(rng, things))
        relation = rng.choice(list(ROWS))
    background = None
    if rng.random() < 0.35 or any(thing.color == "white" for thing in things):
        fitting = [name for name in COLORS if _contrasts(name, things)]
        if not fitting:  # no colour suits all of them
            return random_spec(rng, kind)
        background = rng.choice(fitting)
    return Spec(kind, tuple(things), relation, position, count, background)


def _phrase(thing: Thing) -> str:
    words = f"{thing.size} {thing.color} {thing.shape}" if thing.size else f"{thing.color} {thing.shape}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(spec: Spec, rng: random.Random | None = None) -> str:
    """A caption of `spec`: one of many wordings, or the plainest one without `rng`."""

    def pick(options: Sequence[str]) -> str:
        return rng.choice(options) if rng else options[0]

    phrases = [_phrase(thing) for thing in spec.things]
    if spec.kind == "single":
        text = phrases[0] + (f" {spec.position}" if spec.position else "")
    elif spec.kind == "count":
        shape = spec.things[0].shape
        plural = shape + ("es" if shape.endswith("s") else "s")
        text = f"{NUMBERS[spec.count]} {spec.things[0].color} {plural}"
    elif spec.kind == "pair":
        text = f"{phrases[0]} {pick(RELATIONS[spec.relation or 'and'])} {phrases[1]}"
    else:
        tail = pick(ROWS[spec.relation or "and"])
        text = f"{phrases[0]}, {phrases[1]} and {phrases[2]}" + (f" {tail}" if tail else "")
    if spec.background:
        article = "an" if spec.background[0] in "aeiou" else "a"
        text += pick((f" on {article} {spec.background} background", f", {spec.background} background"))
    text = pick(_OPENINGS) + text
    if rng and rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    if rng and rng.random() < 0.15:
        text += "."
    return text


def _room(rng: random.Random, radius: float, width: int, height: int) -> tuple[float, float]:
    margin = radius + 3
    return rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)


def _single_places(rng: random.Random, spec: Spec, radii: list[float], width: int, height: int) -> list[list[float]]:
    if spec.position is None:
        return [list(_room(rng, radii[0], width, height))]
    out = []
    for share, length in zip(POSITIONS[spec.position], (width, height)):
        margin = radii[0] + 3
        wanted = share * length + rng.uniform(-0.06, 0.06) * length
        out.append(min(max(wanted, margin), length - margin))
    return [out]


def _line_places(
    rng: random.Random, radii: list[float], width: int, height: int, across: bool, scale: float
) -> list[list[float]] | None:
    """Objects one after another along one axis with random gaps, nearly level on the other; None if they don't fit."""
    along, level = (width, height) if across else (height, width)
    free = along - 2 * sum(radii) - 8 * scale - _GAP * scale * (len(radii) - 1)
    if free < 0:
        return None
    cuts = sorted(rng.uniform(0, free) for _ in radii)
    largest = max(radii) + 3
    middle = rng.uniform(largest, level - largest)
    at, out, used = 4 * scale, [], 0.0
    for radius, cut in zip(radii, cuts):
        at += cut - used + radius
        used = cut
        wobble = min(max(middle + rng.uniform(-5, 5) * scale, radius + 3), level - radius - 3)
        out.append([at, wobble] if across else [wobble, at])
        at += radius + _GAP * scale
    return out


def _free_places(rng: random.Random, radii: list[float], width: int, height: int, scale: float) -> list[list[float]]:
    """Anywhere without touching."""
    while True:
        places = [list(_room(rng, radius, width, height)) for radius in radii]
        if all(
            _distance(places[i], places[j]) > 1.15 * (radii[i] + radii[j]) + _GAP * scale
            for i in range(len(radii))
            for j in range(i)
        ):
            return places


def _places(
    rng: random.Random, spec: Spec, width: int, height: int, scale: float
) -> tuple[list[float], list[list[float]]]:
    """(radii, centres) in pixels."""
    table = {"single": _SINGLE_RADIUS, "pair": _PAIR_RADIUS}.get(spec.kind, _TRIPLE_RADIUS)
    while True:
        radii = [rng.uniform(*table[thing.size]) * scale for thing in spec.things]
        if spec.kind == "single":
            return radii, _single_places(rng, spec, radii, width, height)
        if spec.kind == "count":
            radii = radii * spec.count
            return radii, _free_places(rng, radii, width, height, scale)
        relation = spec.relation
        if relation == "and":
            relation = rng.choice(("left", "above", "right", "below") if spec.kind == "pair" else ("row", "column"))
        places = _line_places(rng, radii, width, height, relation in ("left", "right", "row"), scale)
        if places is not None:
            if relation in ("below", "right"):  # the first thing comes last
                places = _line_places(rng, radii[::-1], width, height, relation == "right", scale)
                places = None if places is None else places[::-1]
            if places is not None:
                return radii, places


def place(spec: Spec, rng: random.Random, width: int = 128, height: int = 128, text: str | None = None) -> Scene:
    """A scene that fulfils `spec`, its objects placed at random; `text` is its caption if one is to be kept."""
    scale = min(width, height) / 128
    radii, centres = _places(rng, spec, width, height, scale)
    if spec.background:
        background = COLORS[spec.background]
    else:
        background = tuple(rng.uniform(0.90, 0.97) for _ in range(3))
    things = spec.things * spec.count
    objects = tuple(
        Placed(
            thing.shape,
            tuple(min(max(c + rng.uniform(-0.02, 0.02), 0.0), 1.0) for c in COLORS[thing.color]),
            x,
            y,
            radius,
        )
        for thing, radius, (x, y) in zip(things, radii, centres)
    )
    return Scene(spec, text if text is not None else caption(spec, rng), width, height, background, objects)


def training_scene(rng: random.Random, width: int = 128, height: int = 128) -> Scene:
    """A scene that is not held out."""
    while (spec := random_spec(rng)).held_out:
        pass
    return place(spec, rng, width, height)


def held_out_specs(kind: str, number: int, seed: int = 0) -> list[Spec]:
    """`number` different scenes of a kind that training never sees."""
    rng = random.Random(f"{seed} {kind}")
    found: dict[str, Spec] = {}
    while len(found) < number:
        spec = random_spec(rng, kind)
        if spec.held_out:
            found.setdefault(spec.key(), spec)
    return list(found.values())
