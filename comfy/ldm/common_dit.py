"""Small pieces shared by diffusion transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import comfy.ops
import comfy.patcher_extension


def pad_to_patch_size(
    img: torch.Tensor, patch_size: tuple[int, ...] = (2, 2), padding_mode: str = "circular"
) -> torch.Tensor:
    """Pad the trailing axes of [B, C, *sizes] up to multiples of `patch_size`, by default by wrapping around."""
    missing = [-size % patch for size, patch in zip(img.shape[2:], patch_size)]
    if not any(missing):
        return img
    if padding_mode == "circular" and (torch.jit.is_tracing() or torch.jit.is_scripting()):
        padding_mode = "reflect"
    amounts = [amount for size in reversed(missing) for amount in (0, size)]
    return F.pad(img, tuple(amounts), mode=padding_mode)


def patches_of(x: torch.Tensor, patch: int) -> tuple[torch.Tensor, torch.Size]:
    """Latent [B, C, T, h, w] -> patches [B, L, C*p*p], channel before row before column, and the padded shape."""
    x = pad_to_patch_size(x, (1, patch, patch))
    tokens = x.unflatten(4, (-1, patch)).unflatten(3, (-1, patch)).permute(0, 2, 3, 5, 1, 4, 6)
    return tokens.flatten(4).flatten(1, 3), x.shape


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float | None = 1e-6) -> torch.Tensor:
    """Root-mean-square norm over the last axis (Zhang & Sennrich 2019), in x's dtype."""
    if weight is None:
        return F.rms_norm(x, (x.shape[-1],), eps=eps)
    return F.rms_norm(x, weight.shape, weight=comfy.ops.cast_to(weight, dtype=x.dtype, device=x.device), eps=eps)


def inside_wrappers(
    network: Any, forward: Callable[..., Any], options: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """`forward(*args, **kwargs)` inside the DIFFUSION_MODEL wrappers that custom nodes have put around networks."""
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    wrappers = comfy.patcher_extension.get_all_wrappers(kind, options)
    executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(forward, network, wrappers)
    return executor.execute(*args, **kwargs)
