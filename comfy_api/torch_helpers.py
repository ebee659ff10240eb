"""Compiled models for node packs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.patcher_extension
from comfy.compiled import KEY, CompiledNetwork

__all__ = ["set_torch_compile_wrapper"]


def set_torch_compile_wrapper(
    model: Any,
    backend: str,
    options: dict[str, str] | None = None,
    mode: str | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    keys: Sequence[str] = ("diffusion_model",),
    *args: Any,
    **kwargs: Any,
) -> None:
    """Let a patcher's network run through torch.compile with these options; replaces an earlier wrapper.

    `keys` may name the whole network only. Raises ValueError for parts of it.
    """
    if set(keys) - {"diffusion_model"}:
        raise ValueError(f"parts of a network cannot be compiled on their own here ({', '.join(keys)}); leave keys out")
    given = {"options": options, "mode": mode, "fullgraph": fullgraph or None, "dynamic": dynamic}
    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    model.remove_wrappers_with_key(kind, KEY)
    chosen = {name: value for name, value in given.items() if value is not None}
    model.add_wrapper_with_key(kind, KEY, CompiledNetwork(backend, **chosen))
