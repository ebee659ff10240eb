"""Pictures that a prompt saved: whether they are its own, are all there, and equal the first ones of the same key."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from PIL import Image

from tests.chaos.ledger import Entry
from tests.e2e.compare import furthest


class Pictures:
    """Compares with the first picture of each key; `tolerance` in 1/255. Pictures that were looked at are deleted."""

    def __init__(self, folder: str, tolerance: int) -> None:
        self._folder = folder
        self._tolerance = tolerance
        self._first: dict[str, np.ndarray] = {}
        self.compared = 0
        self.furthest = 0

    def check(self, entry: Entry, outputs: dict[str, Any]) -> list[str]:
        """What is wrong with the pictures of a prompt that succeeded, by the history's `outputs`."""
        images = [i for ui in outputs.values() for i in ui.get("images", ()) if i.get("type") == "output"]
        paths = [os.path.join(self._folder, i.get("subfolder", ""), i["filename"]) for i in images]
        entry.files = [os.path.basename(path) for path in paths]
        if not paths:
            return ["succeeded without a picture"]
        foreign = [name for name in entry.files if not name.startswith(entry.prefix)]
        if foreign:
            return [f"has the files {foreign} of another prompt"]
        try:
            pixels = np.stack([self._read(path) for path in paths])
        except (OSError, SyntaxError, ValueError) as error:
            return [f"a file that it saved cannot be read: {error}"]
        return self._compare(entry, pixels)

    @staticmethod
    def _read(path: str) -> np.ndarray:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB")).astype(np.int16)

    def _compare(self, entry: Entry, pixels: np.ndarray) -> list[str]:
        key = entry.made.key
        if key is None:
            return []
        first = self._first.setdefault(key, pixels)
        if first is pixels:
            return []
        self.compared += 1
        if first.shape != pixels.shape:
            return [f"has pictures of shape {pixels.shape}, the first ones had {first.shape}"]
        distance = furthest(first, pixels)
        self.furthest = max(self.furthest, distance)
        if distance > self._tolerance:
            return [f"has a wrong picture: it differs by {distance}/255 from the first of {key!r}"]
        return []

    def of(self, entry: Entry) -> list[str]:
        """Files in the folder that begin with its prefix."""
        return [name for name in os.listdir(self._folder) if name.startswith(entry.prefix)]

    def delete(self, entry: Entry) -> None:
        """Delete its files."""
        for name in self.of(entry):
            os.unlink(os.path.join(self._folder, name))
