"""Names of newer ComfyUI's `comfy.model_management` that packs call, set or wrap there."""

from __future__ import annotations

from typing import Any

import torch

MAX_PINNED_MEMORY = -1
"""Bytes of host memory that may be pinned by `pin_memory`; below zero none: weights go through pinned buffers instead."""
in_training = False
"""Whether a node is training: what it computes with keeps what derivatives need."""


def intermediate_dtype() -> torch.dtype:
    """The dtype of pictures and latents between nodes."""
    return torch.float32


def lora_compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which patches of weights are computed."""
    return torch.float32


def current_stream(device: torch.device | None) -> Any:
    """The stream that computes on a CUDA device, else None."""
    cuda = device is not None and torch.device(device).type == "cuda"
    return torch.cuda.current_stream(device) if cuda else None


def pin_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor was pinned where it is: never (see `MAX_PINNED_MEMORY`)."""
    return False


def unpin_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor was unpinned: never."""
    return False


def raise_non_oom(error: BaseException) -> None:
    """Raise an error again unless it says that memory ran out."""
    if not isinstance(error, torch.OutOfMemoryError):
        raise error
