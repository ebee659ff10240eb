"""Routes about model files: /models, /embeddings, /view_metadata, /experiment/models."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import os
import struct
from typing import Any

from aiohttp import web

import folder_paths
from app.paths import UnsafePath, inside
from app.responses import json_response
from comfy import media

_MAX_HEADER = 100 * 1024 * 1024
_HIDDEN_KINDS = ("configs", "custom_nodes")
_PREVIEW_EXTENSIONS = (".webp", ".png", ".jpg", ".jpeg", ".gif")


def safetensors_header(path: str) -> dict[str, Any] | None:
    """The JSON header of a safetensors file; None when it has no readable one."""
    try:
        with open(path, "rb") as stream:
            size = struct.unpack("<Q", stream.read(8))[0]
            if size > _MAX_HEADER:
                return None
            header = json.loads(stream.read(size))
    except (OSError, struct.error, ValueError):
        return None
    return header if isinstance(header, dict) else None


def _kind(request: web.Request, name: str = "folder") -> str:
    kind = folder_paths.map_legacy(request.match_info[name])
    if kind not in folder_paths.folder_names_and_paths:
        raise web.HTTPNotFound()
    return kind


def described(kind: str) -> list[dict[str, Any]]:
    """Files of a kind over all its directories; `pathIndex` says which."""
    directories, extensions = folder_paths.folder_names_and_paths[kind]
    result = []
    for index, directory in enumerate(directories):
        names, _ = folder_paths.recursive_search(directory, excluded_dir_names=[".git"])
        for name in folder_paths.filter_files_extensions(names, extensions):
            try:
                stat = os.stat(os.path.join(directory, name))
            except OSError:
                continue
            result.append(
                {
                    "name": name,
                    "pathIndex": index,
                    "modified": stat.st_mtime,
                    "created": stat.st_ctime,
                    "size": stat.st_size,
                }
            )
    return result


def _preview(path: str) -> bytes | None:
    """webp of the picture next to a model file or inside its metadata; None when there is none that can be shown."""
    try:
        return _found_preview(path)
    except (ValueError, OSError, TypeError, SyntaxError) as error:
        logging.info("no preview of %s: %s", os.path.basename(path), error)
        return None


def pictures_of(path: str) -> list[str]:
    """Pictures next to a model file that show what it makes, the one named `.preview` first."""
    stem = os.path.splitext(path)[0]
    names = (stem + infix + extension for extension in _PREVIEW_EXTENSIONS for infix in (".preview", ""))
    return [name for name in names if os.path.isfile(name)]


def covers_of(path: str) -> list[bytes]:
    """Files of the cover images in a safetensors file's metadata. Raises ValueError where they are damaged."""
    covers = ((safetensors_header(path) or {}).get("__metadata__") or {}).get("ssmd_cover_images")
    return [base64.b64decode(picture) for picture in json.loads(covers)] if covers else []


def _found_preview(path: str) -> bytes | None:
    for candidate in pictures_of(path):
        with media.open_picture(candidate) as image:
            return _webp(image)
    for cover in covers_of(path)[:1]:
        with media.open_picture(io.BytesIO(cover), "the cover image") as image:
            return _webp(image)
    return None


def _webp(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="WEBP")
    return buffer.getvalue()


def _add_lists(routes: web.RouteTableDef) -> None:
    @routes.get("/models")
    async def kinds(request: web.Request) -> web.Response:
        return json_response(list(folder_paths.folder_names_and_paths))

    @routes.get("/models/{folder}")
    async def models(request: web.Request) -> web.Response:
        return json_response(folder_paths.get_filename_list(_kind(request)))

    @routes.get("/embeddings")
    async def embeddings(request: web.Request) -> web.Response:
        names = folder_paths.get_filename_list("embeddings")
        return json_response([os.path.splitext(name)[0] for name in names])

    @routes.get("/view_metadata/{folder_name}")
    async def view_metadata(request: web.Request) -> web.Response:
        kind = _kind(request, "folder_name")
        name = request.query.get("filename", "")
        # only names that are listed, so the path needs no further check and linked model folders work
        if not name.endswith(".safetensors") or name not in folder_paths.get_filename_list(kind):
            raise web.HTTPNotFound()
        path = folder_paths.get_full_path(kind, name)
        header = await asyncio.to_thread(safetensors_header, path) if path else None
        if not header or "__metadata__" not in header:
            raise web.HTTPNotFound()
        return json_response(header["__metadata__"])


def add_experiment(routes: web.RouteTableDef) -> None:
    @routes.get("/experiment/models")
    async def kinds(request: web.Request) -> web.Response:
        known = folder_paths.folder_names_and_paths
        return json_response([{"name": kind, "folders": known[kind][0]} for kind in known if kind not in _HIDDEN_KINDS])

    @routes.get("/experiment/models/{folder}")
    async def models(request: web.Request) -> web.Response:
        return json_response(await asyncio.to_thread(described, _kind(request)))

    @routes.get("/experiment/models/preview/{folder}/{path_index}/{filename:.*}")
    async def preview(request: web.Request) -> web.Response:
        directories = folder_paths.folder_names_and_paths[_kind(request)][0]
        index = request.match_info["path_index"]
        if not index.isdigit() or int(index) >= len(directories):
            raise web.HTTPNotFound()
        try:
            path = inside(directories[int(index)], request.match_info["filename"])
        except UnsafePath:
            raise web.HTTPNotFound() from None
        data = await asyncio.to_thread(_preview, path)
        if data is None:
            raise web.HTTPNotFound()
        return web.Response(body=data, content_type="image/webp")


def add_routes(routes: web.RouteTableDef, server: Any) -> None:
    """/models, /embeddings, /view_metadata and /experiment/models."""
    _add_lists(routes)
    add_experiment(routes)
