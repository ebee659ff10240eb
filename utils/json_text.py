"""JSON texts that every reader takes: Python writes NaN and Infinity, which JSON does not have and JSON.parse refuses."""

from __future__ import annotations

import json
import math
from typing import Any


def finite(value: Any, infinity: float | None = None) -> Any:
    """A copy of plain data in which NaN is None and +-Infinity is +-`infinity` (None: None too)."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if infinity is None or math.isnan(value) else math.copysign(infinity, value)
    if isinstance(value, dict):
        return {str(key) if isinstance(key, float) else key: finite(item, infinity) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item, infinity) for item in value]
    return value


def dumps(value: Any, infinity: float | None = None, indent: int | None = None) -> str:
    """JSON of `value`: what JSON does not know is sent as text, numbers that are not finite as in `finite`.

    Raises ValueError for data that contains itself, TypeError for keys that are no texts or numbers.
    """
    try:
        return json.dumps(value, default=str, allow_nan=False, indent=indent)
    except ValueError:  # a number that is not finite, or data that contains itself
        try:
            return json.dumps(finite(value, infinity), default=str, allow_nan=False, indent=indent)
        except RecursionError:
            raise ValueError("the data contains itself, or is nested too deeply for JSON") from None


def loads(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for what is none, NaN and Infinity included, or is nested too deeply."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is no JSON value; write null")
