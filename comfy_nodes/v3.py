"""Short forms for V3 nodes."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyExtension, io
from comfy_nodes.fields import MAX_RESOLUTION


def extension(*classes: type[io.ComfyNode]) -> Any:
    """A `comfy_entrypoint` for these nodes."""

    class Extension(ComfyExtension):
        async def get_node_list(self) -> list[type[io.ComfyNode]]:
            return list(classes)

    async def comfy_entrypoint() -> ComfyExtension:
        return Extension()

    return comfy_entrypoint


def side(name: str, default: int = 1024, low: int = 16, step: int | None = 16) -> Any:
    """A length in pixels."""
    return io.Int.Input(name, default=default, min=low, max=MAX_RESOLUTION, step=step)


def batch(name: str = "batch_size") -> Any:
    return io.Int.Input(name, default=1, min=1, max=4096)


def prompt(name: str) -> Any:
    return io.String.Input(name, multiline=True, dynamic_prompts=True)


def share(name: str, default: float, high: float = 1.0, low: float = 0.0, step: float = 0.01, **options: Any) -> Any:
    """A FLOAT input."""
    return io.Float.Input(name, default=default, min=low, max=high, step=step, **options)
