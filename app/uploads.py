"""Receiving files: parts are written in threads to a temporary file, which gets its name when it is complete."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from aiohttp import BodyPartReader, MultipartReader, web
from aiohttp.http import HttpProcessingError

from utils.atomic_files import Unfinished

PART = 2**20
MOST_FIELDS = 100
LONGEST_FIELD = 2**20


def max_size(request: web.Request) -> int:
    """Largest body in bytes (--max-upload-size)."""
    return request.client_max_size


async def store(parts: AsyncIterator[bytes], file: Unfinished, limit: int) -> int:
    """Write parts as they arrive; their size. Raises HTTP 413 above `limit` bytes, OSError when the disk does not take it."""
    size, waiting = 0, bytearray()
    async for part in parts:
        size += len(part)
        if 0 < limit < size:
            raise web.HTTPRequestEntityTooLarge(limit, size)
        waiting += part
        if len(waiting) >= PART:
            await asyncio.to_thread(file.write, bytes(waiting))
            waiting.clear()
    await asyncio.to_thread(file.write, bytes(waiting))
    return size


async def body_parts(request: web.Request) -> AsyncIterator[bytes]:
    """The request's body as it arrives."""
    while part := await request.content.readany():
        yield part


@dataclass
class Form:
    """Texts of a form by name, and the name of its file; the content is in the file that `read_form` was given."""

    texts: dict[str, str] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    file_name: str | None = None


async def read_form(request: web.Request, file_field: str, file: Unfinished) -> Form:
    """Read a multipart form: the file called `file_field` into `file`, other files are skipped.

    Raises HTTP 400 for what is no such form, 413 above --max-upload-size, OSError when the disk does not take it.
    """
    try:
        return await _read_form(await request.multipart(), max_size(request), file_field, file)
    except (ValueError, LookupError, AssertionError, RuntimeError, HttpProcessingError) as error:
        raise web.HTTPBadRequest(text=f"the form cannot be read: {error}") from None


async def _decoded(part: BodyPartReader) -> AsyncIterator[bytes]:
    while chunk := await part.read_chunk(2**16):
        async for decoded in part.decode_iter(chunk):
            yield decoded


async def _read_form(reader: MultipartReader, limit: int, file_field: str, file: Unfinished) -> Form:
    form, size, fields = Form(), 0, 0
    while (part := await reader.next()) is not None:
        fields += 1
        if not isinstance(part, BodyPartReader) or part.name is None or fields > MOST_FIELDS:
            raise ValueError(f"it has parts without a name, nested parts, or more than {MOST_FIELDS}")
        left = max(1, limit - size) if limit else 0
        if part.filename is None:
            size += await _text(form, part)
        elif part.name == file_field and form.file_name is None:
            size += await store(_decoded(part), file, left)
            form.file_name = part.filename
        else:
            size += await _skip(part, left)
        form.files |= {part.name} if part.filename is not None else set()
        if 0 < limit < size:
            raise web.HTTPRequestEntityTooLarge(limit, size)
    return form


async def _skip(part: BodyPartReader, limit: int) -> int:
    """Read a file that nobody wants; its size. Raises HTTP 413 above `limit` bytes."""
    size = 0
    async for decoded in _decoded(part):
        size += len(decoded)
        if 0 < limit < size:
            raise web.HTTPRequestEntityTooLarge(limit, size)
    return size


async def _text(form: Form, part: BodyPartReader) -> int:
    """Read a text into `form`; its size in bytes."""
    content = bytearray()
    async for decoded in _decoded(part):
        content += decoded
        if len(content) > LONGEST_FIELD:
            raise web.HTTPRequestEntityTooLarge(LONGEST_FIELD, len(content))
    assert part.name is not None
    form.texts.setdefault(part.name, content.decode(part.get_charset(default="utf-8")))
    return len(content)
