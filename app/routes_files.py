"""Routes that show and receive pictures: /view and /upload."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import mimetypes
import os
from collections.abc import Callable
from typing import Any

from aiohttp import web

import folder_paths
from app.paths import UnsafePath, disposition, inside, plain_name, served_type
from app.responses import json_response, storage_error
from app.uploads import Form, read_form
from comfy import media
from comfy_nodes.files import file_digest
from utils import json_text
from utils.atomic_files import Unfinished, is_disk_full

_FORMATS = {"webp": "image/webp", "jpeg": "image/jpeg"}
_DEFAULT_QUALITY = 90


def _directory(kind: str | None, default: str = "output") -> tuple[str, str]:
    kind = kind or default
    directory = folder_paths.get_directory_by_type(kind)
    if directory is None:
        raise web.HTTPBadRequest(text=f"unknown type {kind!r}; use input, output or temp")
    return kind, directory


def _roots() -> tuple[str, ...]:
    """Folders between which symbolic links may lead."""
    return folder_paths.get_input_directory(), folder_paths.get_output_directory(), folder_paths.get_temp_directory()


def _requested_file(query: Any) -> str:
    """Path of the file a /view request asks for; HTTP errors 400, 403, 404."""
    filename, directory = folder_paths.annotated_filepath(query.get("filename", ""))
    if not filename or filename.startswith(("/", "\\")) or ".." in filename:
        raise web.HTTPBadRequest(text="filename must be a plain name")
    if directory is None:
        directory = _directory(query.get("type"))[1]
    try:
        path = inside(directory, query.get("subfolder", ""), os.path.basename(filename), also=_roots())
    except UnsafePath:
        raise web.HTTPForbidden(text="the path leads outside the folder") from None
    if not os.path.isfile(path):
        raise web.HTTPNotFound(text=f"{filename} not found")
    return path


def _preview(path: str, wanted: str) -> tuple[bytes, str]:
    """A picture as webp or jpeg; `wanted` is `webp;90`, `jpeg`."""
    parts = wanted.split(";")
    form = parts[0] if parts[0] in _FORMATS else "webp"
    quality = int(parts[-1]) if parts[-1].isdigit() else _DEFAULT_QUALITY
    with media.open_picture(path) as image:
        plain = form == "jpeg" or image.mode not in ("RGB", "RGBA")
        shown = image.convert("RGB") if plain else image
        buffer = io.BytesIO()
        shown.save(buffer, format=form, quality=quality)
    return buffer.getvalue(), _FORMATS[form]


def _channel(path: str, channel: str) -> tuple[bytes, str]:
    """A picture without its alpha (`rgb`), or its alpha as a picture (`a`)."""
    from PIL import Image

    with media.open_picture(path) as image:
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
        if isinstance(error, OSError) and is_disk_full(error):
            raise
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


def _same_content(first: str, second: str) -> bool:
    return os.path.getsize(first) == os.path.getsize(second) and file_digest(first) == file_digest(second)


def _named(file: Unfinished, folder: str, name: str, overwrite: bool) -> str:
    """Give an upload its name in `folder`: `name`, or with a number when another file has it; the name.

    A file there that has the same content is used instead.
    """
    os.makedirs(folder, exist_ok=True)
    if overwrite:
        file.finish(os.path.join(folder, name))
        return name
    stem, extension = os.path.splitext(name)
    file.close()
    for number in itertools.count():
        candidate = f"{stem} ({number}){extension}" if number else name
        path = os.path.join(folder, candidate)
        try:
            if os.path.isfile(path) and _same_content(path, file.path):
                return candidate
            if not os.path.lexists(path):
                file.finish(path, overwrite=False)
                return candidate
        except (FileExistsError, FileNotFoundError):  # another upload took the name just now, or its file went
            continue
    raise AssertionError("numbers do not end")


def _target(form: Form) -> tuple[str, str, str, str]:
    """Kind, sub-folder, absolute folder and file name of an upload; HTTP 400 when they are not usable."""
    kind, directory = _directory(_text(form, "type"), "input")
    subfolder = _text(form, "subfolder")
    try:
        name = plain_name(form.file_name or "")
        folder = inside(directory, os.path.normpath(subfolder) if subfolder else "", also=_roots())
        inside(folder, name, also=_roots())
    except UnsafePath as error:
        raise web.HTTPBadRequest(text=f"upload refused: {error}") from None
    return kind, subfolder, folder, name


def _text(form: Form, key: str) -> str:
    """A text of a form; "" when it is not there, HTTP 400 when it is a file."""
    if key in form.files:
        raise web.HTTPBadRequest(text=f"the form's {key} must be a text")
    return form.texts.get(key, "")


def _mask(original: str, upload: Unfinished, folder: str) -> Unfinished:
    """PNG of the picture at `original` with the upload's alpha; the original's PNG texts are kept."""
    from PIL.PngImagePlugin import PngInfo

    upload.close()
    with media.open_picture(original) as picture:
        info = PngInfo()
        for key, text in getattr(picture, "text", {}).items():
            info.add_text(key, text)
        result = picture.convert("RGBA")
    with media.open_picture(upload.path, "the mask") as mask:
        result.putalpha(mask.convert("RGBA").getchannel("A").resize(result.size))
    buffer = io.BytesIO()
    result.save(buffer, format="PNG", compress_level=4, pnginfo=info)
    masked = Unfinished(folder)
    try:
        masked.write(buffer.getbuffer())
    except OSError:
        masked.discard()
        raise
    return masked


def _reference(form: Form) -> dict[str, Any] | None:
    """What `original_ref` of a mask names; None when it names nothing."""
    text = _text(form, "original_ref")
    if not text:
        return None
    try:
        reference = json_text.loads(text)
        if not isinstance(reference, dict):
            raise ValueError("not an object")
    except ValueError:
        raise web.HTTPBadRequest(text="original_ref is not a JSON object") from None
    return reference


async def _upload(request: web.Request, with_mask: bool) -> web.Response:
    if request.content_type != "multipart/form-data":
        raise web.HTTPBadRequest(text="the form cannot be read: it is not multipart/form-data")
    root = folder_paths.get_input_directory()
    name = "the file"
    try:
        os.makedirs(root, exist_ok=True)
        with contextlib.ExitStack() as files:
            file = files.enter_context(Unfinished(root))
            form = await read_form(request, "image", file)
            if form.file_name is None:
                raise web.HTTPBadRequest(text="the form has no file called image")
            kind, subfolder, folder, name = _target(form)
            reference = _reference(form) if with_mask else None
            if reference is not None:
                masked = await _worked(_mask, _requested_file(reference), file, root)
                file = files.enter_context(masked)
            overwrite = _text(form, "overwrite") in ("true", "1")
            name = await asyncio.to_thread(_named, file, folder, name, overwrite)
    except OSError as error:
        raise storage_error(error, name[:200]) from None
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
