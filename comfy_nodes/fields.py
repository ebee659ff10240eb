"""Short forms of what INPUT_TYPES says again and again."""

from __future__ import annotations

from typing import Any

MAX_RESOLUTION = 16384
MAX_SEED = 0xFFFFFFFFFFFFFFFF

Field = tuple[Any, ...]


def whole(default: int, low: int, high: int, step: int | None = None, **options: Any) -> Field:
    """An INT input."""
    options = {"default": default, "min": low, "max": high, **options}
    if step is not None:
        options["step"] = step
    return "INT", options


def number(default: float, low: float, high: float, step: float, **options: Any) -> Field:
    """A FLOAT input."""
    return "FLOAT", {"default": default, "min": low, "max": high, "step": step, **options}


def pixels(default: int = 512, low: int = 0, step: int = 8) -> Field:
    """A length in pixels."""
    return whole(default, low, MAX_RESOLUTION, step)


def batch_size() -> Field:
    return whole(1, 1, 4096, tooltip="How many are made at once.")


def seed() -> Field:
    return whole(0, 0, MAX_SEED, control_after_generate=True, tooltip="The same seed gives the same noise.")


def prompt_text() -> Field:
    return "STRING", {"multiline": True, "dynamicPrompts": True}


def guidance_scale() -> Field:
    return number(8.0, 0.0, 100.0, 0.1, round=0.01, tooltip="Weight of the positive against the negative prompt.")
