"""ComfyUI's object for lists of model files, for node packs that ask it: a view of `app.routes_models`."""

from __future__ import annotations

import io
from typing import Any

from aiohttp import web

import folder_paths
from app import routes_models


class ModelFileManager:
    """Model files with sizes and times, and pictures that show what they make.

    Listings are read from the disk each time; `get_cache` and the others keep what packs put there.
    """

    def __init__(self) -> None:
        self.cache: dict[str, Any] = {}

    def get_cache(self, key: str, default: Any = None) -> Any:
        return self.cache.get(key, default)

    def set_cache(self, key: str, value: Any) -> None:
        self.cache[key] = value

    def clear_cache(self) -> None:
        self.cache.clear()

    def add_routes(self, routes: web.RouteTableDef) -> None:
        """/experiment/models and what is below it."""
        routes_models.add_experiment(routes)

    def get_model_file_list(self, folder_name: str) -> list[dict[str, Any]]:
        """`name`, `pathIndex`, `modified`, `created` and `size` of a kind's files. Raises KeyError for no kind."""
        return routes_models.described(folder_paths.map_legacy(folder_name))

    def get_model_previews(self, filepath: str) -> list[str | io.BytesIO]:
        """Paths of pictures next to a model file, and the cover images in its metadata."""
        return [*routes_models.pictures_of(filepath), *map(io.BytesIO, routes_models.covers_of(filepath))]
