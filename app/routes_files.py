"""Routes that show and receive pictures: /view and /upload."""

from __future__ import annotations

import asyncio
import io
import json
import mimetypes
import os
from collections.abc import Callable
from typing import Any

from aiohttp import web
from aiohttp.http import HttpProcessingError

import folder_paths
import node_helpers
from app.paths import UnsafePath, disposition, inside, plain_name, served_type
from app.responses import json_response

_FORMATS = {"webp": "image/webp", "jpeg": "image/jpeg"}
_DEFAULT_QUALITY = 90


def _directory(kind: str | None, default: str = "output") -> tuple[str, str]:
    kind = kind or default
    directory = folder_paths.get_directory_by_type(kind)
    if directory is None:
        raise web.HTTPBadRequest(text=f"unknown type {kind!r}; use input, output or temp")
    return kind, directory


def _requested_file(query: Any) -> str:
    """Path of the file a /view request asks for; HTTP errors 400, 403, 404."""
    filename, directory = folder_paths.annotated_filepath(query.get("filename", ""))
    if not filename or filename.startswith(("/", "\\")) or ".." in filename:
        raise web.HTTPBadRequest(text="filename must be a plain name")
    if directory is None:
        directory = _directory(query.get("type"))[1]
    try:
        path = inside(directory, query.get("subfolder", ""), os.path.basename(filename))
    except UnsafePath:
        raise web.HTTPForbidden(text="the path leads outside the folder") from None
    if not os.path.isfile(path):
        raise web.HTTPNotFound(text=f"{filename} not found")
    return path


def _preview(path: str, wanted: str) -> tuple[bytes, str]:
    """A picture as webp or jpeg; `wanted` is `webp;90`, `jpeg`."""
    from PIL import Image

    parts = wanted.split(";")
    form = parts[0] if parts[0] in _FORMATS else "webp"
    quality = int(parts[-1]) if parts[-1].isdigit() else _DEFAULT_QUALITY
    with Image.open(path) as image:
        plain = form == "jpeg" or image.mode not in ("RGB", "RGBA")
        shown = image.convert("RGB") if plain else image
        buffer = io.BytesIO()
        shown.save(buffer, format=form, quality=quality)
    return buffer.getvalue(), _FORMATS[form]


def _channel(path: str, channel: str) -> tuple[bytes, str]:
    """A picture without its alpha (`rgb`), or its alpha as a picture (`a`)."""
    from PIL import Image

    with Image.open(path) as image:
        if channel == "rgb":
            result = image.convert("RGB")
        else:
            alpha = image.getchannel("A") if "A" in image.getbands() else Image.new("L", image.size, 255)
            result = Image.new("RGBA", image.size)
            result.putalpha(alpha)
        buffer = io.BytesIO()
        result.save(buffer, format="PNG")
    return buffer.getvalue(), "image/png"


async def _worked(work: Callable[..., Any], *arguments: Any) -> Any:
    """Work on pictures in a thread; HTTP 400 when one is none."""
    from PIL import Image

    try:
        return await asyncio.to_thread(work, *arguments)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise web.HTTPBadRequest(text=f"the file is not a picture that can be shown: {error}") from None


async def _view(request: web.Request) -> web.StreamResponse:
    path = _requested_file(request.query)
    name = os.path.basename(path)
    channel = request.query.get("channel", "rgba")
    if "preview" in request.query:
        data, kind = await _worked(_preview, path, request.query["preview"])
    elif channel in ("rgb", "a"):
        data, kind = await _worked(_channel, path, channel)
    else:
        kind = served_type(mimetypes.guess_type(name)[0] or "application/octet-stream")
        headers = {
            "Content-Disposition": disposition(kind, name),
            "Content-Type": kind,
            "X-Content-Type-Options": "nosniff",
        }
        return web.FileResponse(path, headers=headers)
    headers = {"Content-Disposition": disposition(kind, name), "X-Content-Type-Options": "nosniff"}
    return web.Response(body=data, content_type=kind, headers=headers)


def _same_content(path: str, data: bytes) -> bool:
    if os.path.getsize(path) != len(data):
        return False
    with open(path, "rb") as stream:
        return node_helpers.hasher()(stream.read()).digest() == node_helpers.hasher()(data).digest()


def _free_name(folder: str, name: str, data: bytes) -> tuple[str, bool]:
    """A name for new content in `folder`, and whether it still has to be written."""
    stem, extension = os.path.splitext(name)
    number = 0
    candidate = name
    while os.path.exists(os.path.join(folder, candidate)):
        if os.path.isfile(os.path.join(folder, candidate)) and _same_content(os.path.join(folder, candidate), data):
            return candidate, False
        number += 1
        candidate = f"{stem} ({number}){extension}"
    return candidate, True


def _text(form: Any, key: str) -> str:
    """A field of a form; "" when it is not there, HTTP 400 when it is a file."""
    value = form.get(key) or ""
    if not isinstance(value, str):
        raise web.HTTPBadRequest(text=f"the form's {key} must be a text")
    return value


def _target(form: Any) -> tuple[str, str, str, str]:
    """Kind, sub-folder, absolute folder and file name of an upload; HTTP 400 when they are not usable."""
    kind, directory = _directory(_text(form, "type"), "input")
    subfolder = _text(form, "subfolder")
    try:
        name = plain_name(form["image"].filename)
        folder = inside(directory, os.path.normpath(subfolder) if subfolder else "")
        inside(folder, name)
    except (UnsafePath, AttributeError, KeyError) as error:
        raise web.HTTPBadRequest(text=f"upload refused: {error}") from None
    return kind, subfolder, folder, name


def _store(folder: str, name: str, data: bytes, overwrite: bool) -> str:
    os.makedirs(folder, exist_ok=True)
    to_write = True
    if not overwrite:
        name, to_write = _free_name(folder, name, data)
    if to_write:
        with open(os.path.join(folder, name), "wb") as stream:
            stream.write(data)
    return name


def _masked(original: str, upload: bytes) -> bytes:
    """PNG of the picture at `original` with the upload's alpha; the original's PNG texts are kept."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    with Image.open(original) as picture:
        info = PngInfo()
        for key, text in getattr(picture, "text", {}).items():
            info.add_text(key, text)
        result = picture.convert("RGBA")
        with Image.open(io.BytesIO(upload)) as mask:
            result.putalpha(mask.convert("RGBA").getchannel("A").resize(result.size))
        buffer = io.BytesIO()
        result.save(buffer, format="PNG", compress_level=4, pnginfo=info)
    return buffer.getvalue()


async def _upload(request: web.Request, with_mask: bool) -> web.Response:
    try:
        form = await request.post()
    except (ValueError, LookupError, AssertionError, RuntimeError, HttpProcessingError) as error:
        raise web.HTTPBadRequest(text=f"the form cannot be read: {error}") from None
    if "image" not in form or not isinstance(form["image"], web.FileField):
        raise web.HTTPBadRequest(text="the form has no file called image")
    kind, subfolder, folder, name = _target(form)
    data = form["image"].file.read()
    if with_mask and _text(form, "original_ref"):
        try:
            reference = json.loads(_text(form, "original_ref"))
            if not isinstance(reference, dict):
                raise ValueError("not an object")
        except ValueError:
            raise web.HTTPBadRequest(text="original_ref is not a JSON object") from None
        data = await _worked(_masked, _requested_file(reference), data)
    overwrite = _text(form, "overwrite") in ("true", "1")
    try:
        name = await asyncio.to_thread(_store, folder, name, data, overwrite)
    except OSError as error:
        raise web.HTTPBadRequest(text=f"the file cannot be stored as {name}: {error.strerror}") from None
    return json_response({"name": name, "subfolder": subfolder, "type": kind})


def add_routes(routes: web.RouteTableDef, server: Any) -> None:
    """/view, /upload/image and /upload/mask."""

    @routes.get("/view")
    async def view(request: web.Request) -> web.StreamResponse:
        return await _view(request)

    @routes.post("/upload/image")
    async def upload_image(request: web.Request) -> web.Response:
        return await _upload(request, with_mask=False)

    @routes.post("/upload/mask")
    async def upload_mask(request: web.Request) -> web.Response:
        return await _upload(request, with_mask=True)
