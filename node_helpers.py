"""Small helpers that nodes, ours and foreign ones, share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def conditioning_set_values(
    conditioning: list[Any], values: Mapping[str, Any] | None = None, append: bool = False
) -> list[Any]:
    """A conditioning with `values` set in the dict of every entry; `append` adds to lists that are there already."""
    result = []
    for tensor, fields in conditioning:
        changed = fields.copy()
        for key, value in (values or {}).items():
            old = fields.get(key) if append else None
            changed[key] = value if old is None else old + value
        result.append([tensor, changed])
    return result


def pillow(function: Callable[[Any], T], argument: Any) -> T:
    """`function(argument)` of Pillow; a damaged picture is read as far as it goes."""
    from PIL import ImageFile, UnidentifiedImageError

    try:
        return function(argument)
    except (OSError, UnidentifiedImageError, ValueError):
        before = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            return function(argument)
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def hasher() -> Callable[..., Any]:
    """Constructor of the hash chosen by --default-hashing-function."""
    from comfy.cli_args import args

    return getattr(hashlib, args.default_hashing_function)


def string_to_torch_dtype(string: str) -> Any:
    """`fp32`, `fp16` or `bf16` as torch dtype; None for any other word."""
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}.get(string)


def image_alpha_fix(destination: Any, source: Any) -> tuple[Any, Any]:
    """Give both images [B, H, W, C] the same channels: a destination without alpha drops the source's, or gets one."""
    import torch

    if destination.shape[-1] < source.shape[-1]:
        source = source[..., : destination.shape[-1]]
    elif destination.shape[-1] > source.shape[-1]:
        source = torch.nn.functional.pad(source, (0, 1), value=1.0)
    return destination, source
