"""Messages to pages over WebSocket: texts as JSON, pictures and texts as binary frames.

A binary frame is a 4-byte big-endian event number and its payload.
"""

from __future__ import annotations

import io
import struct
from typing import Any

from comfy_execution.message_types import BinaryEventTypes
from utils.json_text import dumps

_IMAGE_NUMBERS = {"JPEG": 1, "PNG": 2}


def frame(event: int, payload: bytes) -> bytes:
    return struct.pack(">I", event) + payload


def encoded_image(preview: tuple[str, Any, int | None]) -> tuple[str, bytes]:
    """A preview (format JPEG or PNG, PIL image, longest side or None) as format and file content."""
    from PIL import Image, ImageOps

    form, image, max_size = preview
    if max_size is not None:
        image = ImageOps.contain(image, (max_size, max_size), Image.Resampling.BILINEAR)
    form = form if form in _IMAGE_NUMBERS else "PNG"
    if form == "JPEG" and image.mode != "RGB":
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, format=form, quality=95, compress_level=1)
    return form, buffer.getvalue()


def image_frame(preview: tuple[str, Any, int | None]) -> bytes:
    """Event 1: number of the format (1 JPEG, 2 PNG), then the file."""
    form, data = encoded_image(preview)
    return frame(BinaryEventTypes.PREVIEW_IMAGE, struct.pack(">I", _IMAGE_NUMBERS[form]) + data)


def image_with_metadata_frame(preview: tuple[str, Any, int | None], metadata: dict[str, Any]) -> bytes:
    """Event 4: length of the metadata, the metadata as JSON (with `image_type`), then the file."""
    form, data = encoded_image(preview)
    text = dumps({**metadata, "image_type": f"image/{form.lower()}"}).encode("utf-8")
    return frame(BinaryEventTypes.PREVIEW_IMAGE_WITH_METADATA, struct.pack(">I", len(text)) + text + data)


def text_frame(text: str | bytes, node_id: str) -> bytes:
    """Payload of event 3: length of the node id, the id, the text."""
    node = node_id.encode("utf-8")
    body = text.encode("utf-8") if isinstance(text, str) else text
    return struct.pack(">I", len(node)) + node + body
