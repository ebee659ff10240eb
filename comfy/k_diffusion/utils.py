"""A folder of pictures as a data set, under the name that packs import from k-diffusion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image


class FolderOfImages:
    """The pictures below a folder, sorted by path; `[i]` is a tuple of one picture, RGB, passed through `transform`."""

    IMG_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})

    def __init__(self, root: str | Path, transform: Callable[[Any], Any] | None = None) -> None:
        self.root = Path(root)
        self.transform = transform
        self.paths = sorted(path for path in self.root.rglob("*") if path.suffix.lower() in self.IMG_EXTENSIONS)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: int) -> tuple[Any]:
        with Image.open(self.paths[key]) as file:
            picture = file.convert("RGB")
        return (picture if self.transform is None else self.transform(picture),)
