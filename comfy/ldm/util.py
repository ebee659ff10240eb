"""Small helpers packs import."""

from __future__ import annotations

from typing import Any


def exists(value: Any) -> bool:
    """Whether a value is not None."""
    return value is not None
