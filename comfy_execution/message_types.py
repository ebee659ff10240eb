"""Numbers of the binary WebSocket messages, for those who send them and those who encode them."""

from __future__ import annotations


class BinaryEventTypes:
    """First four bytes of a binary message, big-endian."""

    PREVIEW_IMAGE = 1
    UNENCODED_PREVIEW_IMAGE = 2
    TEXT = 3
    PREVIEW_IMAGE_WITH_METADATA = 4
