"""Names of node types and shapes of what nodes and wrappers get, for annotations of V1 nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypedDict

import torch

from comfy.comfy_types.node_typing import IO, CheckLazyMixin, ComfyNodeABC, FileLocator, InputTypeDict


class UnetApplyFunction(Protocol):
    """A denoiser: x [B, C, H, W] at sigmas t [B]."""

    def __call__(self, x: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> torch.Tensor: ...


class UnetApplyConds(TypedDict, total=False):
    """Conditionings of a denoiser call."""

    c_concat: torch.Tensor
    c_crossattn: torch.Tensor
    control: Any
    transformer_options: dict[str, Any]


class UnetParams(TypedDict):
    """What a wrapper of the denoiser gets."""

    input: torch.Tensor
    timestep: torch.Tensor
    c: UnetApplyConds
    cond_or_uncond: list[int]


UnetWrapperFunction = Callable[[UnetApplyFunction, UnetParams], torch.Tensor]

__all__ = [
    "CheckLazyMixin",
    "ComfyNodeABC",
    "FileLocator",
    "IO",
    "InputTypeDict",
    "UnetApplyConds",
    "UnetApplyFunction",
    "UnetParams",
    "UnetWrapperFunction",
]
