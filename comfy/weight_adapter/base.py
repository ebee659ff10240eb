"""What every adapter can do, and the arithmetic they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Transform = Callable[[torch.Tensor], torch.Tensor]


def pad_to_shape(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Zero-pad each axis at its end up to `shape`.

    Raises ValueError when an axis is longer than asked for or the number of axes differs.
    """
    if tensor.ndim != len(shape) or any(old > new for old, new in zip(tensor.shape, shape)):
        raise ValueError(f"cannot pad a weight of shape {tuple(tensor.shape)} to {tuple(shape)}")
    out = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    out[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return out


def decompose(scale: torch.Tensor, weight: torch.Tensor, difference: torch.Tensor, strength: float) -> torch.Tensor:
    """DoRA (Liu et al. 2024, eq. 5): set the norms of weight + difference to `scale`, mixed in by `strength`.

    `scale` holds one magnitude per output ([out, 1]) or per input ([1, in]); the former is divided by the norm of the
    weight alone, the latter by that of the changed weight, as the trainers of each kind do.
    """
    changed = weight + difference
    scale = scale.to(weight.device, weight.dtype)
    if scale.shape[0] == changed.shape[0]:
        norm = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    else:
        norm = changed.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (weight.ndim - 2))
    target = changed * (scale / (norm + torch.finfo(weight.dtype).eps))
    return weight + strength * (target - weight)


def weight_decompose(
    dora_scale: torch.Tensor,
    weight: torch.Tensor,
    lora_diff: torch.Tensor,
    alpha: float,
    strength: float,
    intermediate_dtype: torch.dtype,
    function: Any,
) -> torch.Tensor:
    """ComfyUI's name and arguments of `decompose`."""
    change = function(lora_diff.to(intermediate_dtype) * alpha)
    return decompose(dora_scale.to(intermediate_dtype), weight.to(intermediate_dtype), change, strength).to(
        weight.dtype
    )


class WeightAdapterBase:
    """One adapter of one weight. `weights` are the file's tensors, `loaded_keys` their names in the file."""

    name: str = ""

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights

    @classmethod
    def load(
        cls,
        x: str,
        lora: dict[str, torch.Tensor],
        alpha: float | None,
        dora_scale: torch.Tensor | None,
        loaded_keys: set[str] | None = None,
    ) -> WeightAdapterBase | None:
        """The adapter whose keys begin with `x`, or None when the file has none of this kind there."""
        raise NotImplementedError

    def difference(self, shape: torch.Size, dtype: torch.dtype, device: torch.device, weight: torch.Tensor) -> Any:
        """(change of the weight in `shape` at strength 1, DoRA scale or None)."""
        raise NotImplementedError

    def new_shape(self) -> tuple[int, ...] | None:
        """The shape to which the weight is padded first, when the adapter enlarges it."""
        return None

    def calculate_weight(
        self,
        weight: torch.Tensor,
        key: str,
        strength: float,
        strength_model: float = 1.0,
        offset: tuple[int, int, int] | None = None,
        function: Transform | None = None,
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> torch.Tensor:
        """The weight with this adapter at `strength`, in the weight's dtype."""
        shape = self.new_shape()
        if shape is not None:
            weight = pad_to_shape(weight, shape)
        change, scale = self.difference(weight.shape, intermediate_dtype, weight.device, weight)
        if function is not None:
            change = function(change)
        if scale is not None:
            return decompose(scale, weight.to(intermediate_dtype), change, strength).to(weight.dtype)
        return weight + (strength * change).to(weight.dtype)
